"""Campaigns on a micro model that both engines do, and the comparison of their tables."""

from __future__ import annotations

from pathlib import Path

from micro_campaign import MicroPlace, numbers

from experiments.command_line import main

LOCATIONS = "--sweep.fault.location=q,k,v,scores,weights,out"
FEW = '--detect.detectors=["lite","s@w","oracle_s@w"]'


def arguments(place: MicroPlace, output: Path, *more: str, bits: str = "3,30") -> list[str]:
    """Return those of a campaign of 36 runs on two windows of 20 tokens, unless given otherwise."""
    fixed = {"--data.seq_len": "20", "--data.num_samples": "2", "--num_runs": "3"}
    given = {argument.partition("=")[0] for argument in more}
    own = [f"{key}={value}" for key, value in fixed.items() if key not in given]
    sweep = [] if {"--fault.location", "--sweep.fault.location"} & given else [LOCATIONS]
    detectors = [] if {"--detect.detectors", "--sweep.detect.detectors"} & given else [FEW]
    return place.arguments(output, *own, *sweep, *detectors, *more, bits=bits)


def campaign(place: MicroPlace, output: Path, *more: str, bits: str = "3,30") -> Path:
    assert main(arguments(place, output, *more, bits=bits)) == 0
    return output / "micro"


def same_tables(one: Path, other: Path) -> None:
    assert numbers(one / "runs.csv") == numbers(other / "runs.csv")
    for name in ("detections.csv", "propagation.csv", "clean.csv", "failures.csv", "plan.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name
