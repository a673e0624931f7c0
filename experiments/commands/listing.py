"""``run_sweep.py --list``: print the values that can be chosen.

    print_list("locations", config)
    print_list("launchers", config)

``LISTS`` is the table: a word, and the function that prints its list. Each function imports the heavy modules it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from experiments.launchers.registry import LAUNCHERS
from experiments.registry import Registry

if TYPE_CHECKING:
    from experiments.config import ExperimentConfig

_STORED_ONLY = "  [no model is computed in it]"


def print_list(what: str, config: ExperimentConfig) -> None:
    """Print one list; ``what`` is a word of ``LISTS``."""
    LISTS.find(what)(config)


def _print_pairs(pairs: Iterable[tuple[str, str]], width: int) -> None:
    for name, meaning in pairs:
        print(f"{name:{width}} {meaning}")


def _print_models(config: ExperimentConfig) -> None:
    from experiments.inputs.model_places import BUILT_IN_MODELS

    _print_pairs(((name, "built in") for name in BUILT_IN_MODELS), 16)
    print("or a local folder, or a hub name (safetensors)")


def _print_locations(config: ExperimentConfig) -> None:
    from fault_injection.locations import LOCATION_TABLE

    for row in LOCATION_TABLE:
        marks = ["not in the default set"] if not row.default else []
        marks += ["effects of faults are not predicted"] if not row.closed_form else []
        print(f"{row.name:8} {row.meaning}" + (f"  [{'; '.join(marks)}]" if marks else ""))


def _print_kinds(config: ExperimentConfig) -> None:
    from fault_injection.faults.kinds import FAULT_KINDS

    _print_pairs(((kind.name, kind.meaning) for kind in FAULT_KINDS), 15)


def _print_formats(config: ExperimentConfig) -> None:
    from fault_injection.numbers.formats import FORMATS

    for number in FORMATS:
        fields = "  ".join(f"{name} {_span(bits)}" for name, bits in number.fields.items())
        print(f"{number.name:14} {number.bits:2} bits: {fields}" + ("" if number.computes else _STORED_ONLY))


def _span(bits: range) -> str:
    return str(bits[0]) if len(bits) == 1 else f"{bits[0]}..{bits[-1]}"


def _print_detectors(config: ExperimentConfig) -> None:
    from bounds import get_detector, list_detectors
    from bounds.suites import SUITES

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
    from experiments.inputs.models import load_model
    from experiments.passes.subject import Subject

    loaded = load_model(config.model)
    with Subject(loaded.model, loaded.family) as subject:
        for core in subject.cores:
            equal = subject.kv_equal.get(core.index)
            print(f"{core.index:4} {core.name:48} path {core.path}  K = V: {'yes' if equal else 'no'}")


def _print_sources(config: ExperimentConfig) -> None:
    from experiments.config.source_names import SOURCES

    _print_pairs(((source.form, source.meaning) for source in SOURCES.values()), 18)


def _print_fields(config: ExperimentConfig) -> None:
    from experiments.config import known_fields

    print("\n".join(known_fields()))


def _print_families(config: ExperimentConfig) -> None:
    from experiments.inputs.families import FAMILIES

    _print_pairs(((name, f"{family.meaning}  [{family.auto_class}]") for name, family in FAMILIES.items()), 16)


def _print_figures(config: ExperimentConfig) -> None:
    from experiments.figures.catalogue import FIGURES

    _print_pairs(((name, f"{entry.title}  [{', '.join(entry.needs)}]") for name, entry in FIGURES.items()), 24)


def _print_launchers(config: ExperimentConfig) -> None:
    _print_pairs(((name, launcher.meaning) for name, launcher in LAUNCHERS.items()), 8)


def _print_columns(config: ExperimentConfig) -> None:
    from experiments.tables.readme import column_lines
    from experiments.tables.schema import TABLES

    for table, row_type in TABLES.items():
        print(f"{table}.csv")
        for name, kind, unit, meaning in column_lines(row_type):
            print(f"  {name:19} {kind}{f' ({unit})' if unit else ''}: {meaning.replace('*(', '(').replace(')*', ')')}")


LISTS: Registry[Callable[[ExperimentConfig], None]] = Registry(
    "--list",
    {
        "models": _print_models,
        "locations": _print_locations,
        "kinds": _print_kinds,
        "formats": _print_formats,
        "detectors": _print_detectors,
        "layers": _print_layers,
        "sources": _print_sources,
        "fields": _print_fields,
        "families": _print_families,
        "launchers": _print_launchers,
        "columns": _print_columns,
        "figures": _print_figures,
    },
)
