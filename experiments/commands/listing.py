"""``run_sweep.py --list``: what can be chosen.

Public name: ``print_list``.
"""

from __future__ import annotations

from bounds import get_detector, list_detectors
from bounds.suites import SUITES
from experiments.config import ExperimentConfig, known_fields
from experiments.config.checks import check_choice
from experiments.config.source_names import SOURCES
from experiments.inputs.models import BUILT_IN_MODELS, load_model
from experiments.passes.subject import Subject
from fault_injection import LOCATIONS

_LOCATION_MEANINGS = {
    "q": "queries as the score product reads them (after rotation and normalisation)",
    "k": "keys as the score product reads them",
    "v": "values as the output product reads them",
    "scores": "what QK^T gave, before mask (and before the scale where the model applies it after)",
    "weights": "what the softmax returned",
    "out": "weights times values, per head",
}


def print_list(what: str, config: ExperimentConfig) -> None:
    """Print one list: ``models``, ``locations``, ``detectors``, ``layers``, ``sources`` or ``fields``."""
    check_choice("--list", what, ("models", "locations", "detectors", "layers", "sources", "fields"))
    if what == "models":
        for name in BUILT_IN_MODELS:
            print(f"{name:16} built in")
        print("or a local folder, or a hub name (safetensors)")
    elif what == "locations":
        for name in LOCATIONS:
            print(f"{name:8} {_LOCATION_MEANINGS[name]}")
    elif what == "detectors":
        _print_detectors()
    elif what == "sources":
        for name, meaning in SOURCES.items():
            print(f"{name:18} {meaning}")
    elif what == "fields":
        print("\n".join(known_fields()))
    else:
        _print_layers(config)


def _print_detectors() -> None:
    for detector in map(get_detector, list_detectors()):
        marks = [f"cost: {detector.cost}", f"reads {_joined(detector.needs)}"]
        if not detector.proved:
            marks.append("no theorem rules out false positives")
        print(f"{detector.name:14} {detector.statement}  [{'; '.join(marks)}]")
    print("\nsuites, which stand for their members:")
    for suite, members in SUITES.items():
        print(f"{suite:14} {', '.join(members)}")
    print("\nyour own: module:Class or file.py:Class, a subclass of bounds.Detector")


def _joined(names: object) -> str:
    return ", ".join(sorted(names)) if isinstance(names, (set, frozenset)) else str(names)


def _print_layers(config: ExperimentConfig) -> None:
    loaded = load_model(config.model)
    with Subject(loaded.model, loaded.family) as subject:
        for core in subject.cores:
            equal = subject.kv_equal.get(core.index)
            print(f"{core.index:4} {core.name:48} path {core.path}  K = V: {'yes' if equal else 'no'}")
