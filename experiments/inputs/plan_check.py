"""What the configuration file of a model rules out, before any weight is read.

check_plan(make_plan(config))       # UsageError: fault.layers: got 7, allowed 0..1 for reference
"""

from __future__ import annotations

from experiments.config import ExperimentConfig
from experiments.errors import UsageError
from experiments.inputs.families import FAMILIES
from experiments.inputs.model_places import read_model_facts
from experiments.plan.plan import Plan


def check_before_loading(config: ExperimentConfig) -> None:
    """Refuse what the model's configuration file alone rules out: layers, heads and windows that are too large.

    Raises:
        UsageError: out of range. MissingResourceError: the model is not there.
    """
    facts = read_model_facts(config.model)
    if facts is None:
        return
    for layer in config.fault.layer_list() or ():
        if facts.num_layers is not None and layer >= facts.num_layers and not FAMILIES[facts.family].two_stacks:
            raise UsageError(f"fault.layers: got {layer}, allowed 0..{facts.num_layers - 1} for {config.model.path}")
    head = config.fault.index.head
    if head is not None and facts.num_heads is not None and head >= facts.num_heads:
        raise UsageError(f"fault.index.head: got {head}, allowed 0..{facts.num_heads - 1} for {config.model.path}")
    if facts.max_positions is not None and config.data.seq_len > facts.max_positions:
        raise UsageError(
            f"data.seq_len: got {config.data.seq_len}, allowed 2..{facts.max_positions} for {config.model.path}"
        )


def check_plan(plan: Plan) -> None:
    """Run ``check_before_loading`` for every point of a plan whose model, data or place of the fault differs."""
    relevant = [
        i for i, key in enumerate(plan.axes) if key.startswith(("model.", "data.", "fault.layers", "fault.index"))
    ]
    seen: set[str] = set()
    for run in plan.runs:
        key = repr([run.values[i] for i in relevant])
        if key not in seen:
            seen.add(key)
            check_before_loading(plan.config_of(run))
