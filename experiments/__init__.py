"""Experiments: configuration, plan, models, data, runner, results and the command line.

from experiments.config import ExperimentConfig
from experiments.runner import CompleteExperimentRunner
"""

__version__ = "0.1.0"
