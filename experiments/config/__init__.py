"""The configuration of a campaign, from Python, from YAML, from dotted options, or from all of these.

>>> config = ExperimentConfig(name="bits", seed=1, fault=FaultConfig(location="scores", bit=30))
>>> config == ExperimentConfig(exp_name="bits", seed=1, injection_location="scores", injection_bit=30)  # flat spelling
True
>>> load_config(["--name", "bits", "--fault.location", "q"]).fault.location  # also --config FILE, in front of the rest
'q'
"""

from experiments.config.building import flat_fields, known_fields
from experiments.config.experiment import (
    ExperimentConfig,
    config_from_mapping,
    dump_config,
    load_config,
    read_config_file,
)
from experiments.config.fault_section import FaultConfig, IndexConfig
from experiments.config.sections import DataConfig, DetectConfig, ModelConfig, RunConfig, StopConfig
from experiments.config.slurm_section import SlurmConfig

__all__ = [
    "DataConfig",
    "DetectConfig",
    "ExperimentConfig",
    "FaultConfig",
    "IndexConfig",
    "ModelConfig",
    "RunConfig",
    "SlurmConfig",
    "StopConfig",
    "config_from_mapping",
    "dump_config",
    "flat_fields",
    "known_fields",
    "load_config",
    "read_config_file",
]
