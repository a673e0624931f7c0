"""Faults drawn by aim: their weights undo it, and they depend on the run alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_campaign import MicroPlace, numbers, table
from scipy.stats import chisquare

from experiments.command_line import main
from experiments.config import ExperimentConfig, load_config
from experiments.engine.contexts import Contexts
from experiments.engine.pairs import PairedRunner
from experiments.errors import UsageError
from experiments.plan.plan import make_plan
from experiments.runs import aim, clean_sites
from experiments.runs.aim import FLOOR, draw_by_bits, preference
from experiments.runs.record import DrawnRun
from fault_injection import FaultSpec, Site, draw_fault
from monitoring import TraceWriter


@pytest.fixture(scope="module")
def pairs(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PairedRunner]:
    with Contexts(TraceWriter(None)) as contexts:
        yield contexts.open(config_of(place, "effect"))


def config_of(place: MicroPlace, chosen: str, runs: int = 1, *more: str) -> ExperimentConfig:
    options = (f"--fault.aim={chosen}", f"--num_runs={runs}", "--fault.bit=null", "--detect.detectors=[]", *more)
    return load_config(place.arguments(Path("nowhere"), *options))


def draws(pairs: PairedRunner, config: ExperimentConfig) -> list[DrawnRun]:
    plan = make_plan(config)
    return [pairs.drawing.draw(run, plan.config_of(run)) for run in plan.runs]


# ------------------------------------------------------------------------------------------------- weights


def agrees(parts: np.ndarray, expected: float) -> bool:
    """Whether a mean is within 4.5 of its standard deviations."""
    return abs(parts.mean() - expected) <= 4.5 * parts.std() / math.sqrt(len(parts))


@pytest.mark.parametrize("chosen", ["bits", "effect"])
@pytest.mark.parametrize("location", ["q", "scores", "out"])
def test_weighted_means_are_those_of_uniform_drawing(
    pairs: PairedRunner, place: MicroPlace, chosen: str, location: str
) -> None:
    """Shares that are known by counting: of bits, of layers, of rows; the causal rows of scores are not alike."""
    found = draws(pairs, config_of(place, chosen, 1500, f"--fault.location={location}"))
    weight = np.array([run.sampling_weight for run in found])
    faults = [run.faults[0] for run in found]
    bits = np.array([fault.bits[0] for fault in faults])
    rows = np.array([fault.index[2] for fault in faults])
    share = 12 / 78 if location == "scores" else 1 / 12
    assert agrees(weight, 1.0)
    assert agrees(weight * (bits == 30), 1 / 32)
    assert agrees(weight * (bits < 23), 23 / 32)
    assert agrees(weight * (rows == 11), share)
    assert agrees(weight * (np.array([fault.layer for fault in faults]) == 1), 0.5)
    # It does aim: without the weights, bits of the exponent are far too many.
    assert (bits >= 23).mean() > 1.5 * 9 / 32
    assert all(fault.dtype == "float32" and not fault.masked_position for fault in faults)


def test_a_choice_among_candidates_is_unbiased_for_any_preference() -> None:
    """All sets of two candidates of three, all choices: the expectation of weight times outcome, by enumeration."""
    outcome, preferred = np.array([0.2, 3.0, -1.0]), np.array([0.05, 0.9, 0.4])
    total = 0.0
    for drawn in itertools.product(range(3), repeat=2):
        g = preferred[list(drawn)]
        for place, one in enumerate(drawn):
            total += (1 / 9) * (g[place] / g.sum()) * (g.mean() / g[place]) * outcome[one]
    assert total == pytest.approx(outcome.mean())


def test_choices_have_the_probabilities_they_are_given() -> None:
    shares, random = np.array([1.0, 0.0, 3.0, 0.5]), np.random.default_rng(0)
    counts = np.bincount([aim._choose(shares, random) for _ in range(9000)], minlength=4)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2, 3]], 9000 * shares[[0, 2, 3]] / 4.5).pvalue > 1e-4


def test_preference_grows_with_severity_between_its_limits() -> None:
    found = preference(np.array([0.0, 1e-300, 1e-6, 0.1, 0.5, 2.0, 1e30, math.inf, math.nan]))
    assert bool(np.all(np.diff(found[:-1]) >= 0))
    assert (found[0], found[1], found[-2], found[-1]) == (FLOOR, FLOOR, 1.0, 1.0)
    assert found[4] == pytest.approx(FLOOR + (1 - FLOOR) * math.sqrt(0.5))


SITES = [Site(layer, "m", "q", (1, 2, 3, 4), 4, torch.float32) for layer in range(2)]


def test_bits_are_drawn_eight_to_one_and_the_weight_is_exact() -> None:
    random = np.random.default_rng(0)
    found = [draw_by_bits(FaultSpec("q"), SITES[:1], random) for _ in range(6000)]
    counts = np.bincount([faults[0].bits[0] for faults, _ in found], minlength=32)
    probability = np.where(np.arange(32) < 23, 1.0, 8.0) / (23 + 9 * 8)
    assert chisquare(counts, 6000 * probability).pvalue > 1e-4
    for faults, weight in found:
        assert weight == pytest.approx(1 / 32 / probability[faults[0].bits[0]])


def test_weights_of_several_layers_multiply_and_a_field_of_equals_has_none() -> None:
    random = np.random.default_rng(0)
    faults, weight = draw_by_bits(FaultSpec("q"), SITES, random)
    alone = [(23 + 72) / 32 / (1 if fault.bits[0] < 23 else 8) for fault in faults]
    assert weight == pytest.approx(math.prod(alone))
    for field in ("exponent", "mantissa", "sign"):
        assert draw_by_bits(FaultSpec("q", bits=field), SITES, random)[1] == 1


# ------------------------------------------------------------------------------------------------- determinism


def test_uniform_faults_are_those_of_the_generator(pairs: PairedRunner, place: MicroPlace) -> None:
    """Batch, layer, element, bit, from the run's generator and nothing else: as before there were aims."""
    plan = make_plan(config_of(place, "uniform", 40, "--fault.location=scores"))
    for run in plan.runs:
        config, random = plan.config_of(run), run.generator()
        drawn = pairs.drawing.draw(run, config)
        batch, layer = int(random.integers(4)), int(random.integers(2))
        site = pairs.baseline(batch, config).sites[layer, "scores"]
        assert (drawn.batch_index, drawn.faults) == (batch, (draw_fault(config.fault.spec(), site, random),))
        assert drawn.sampling_weight == 1.0


@pytest.mark.parametrize("mode", ["random", "first", "all"])
def test_a_draw_depends_on_the_run_alone(
    pairs: PairedRunner, place: MicroPlace, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config = config_of(place, "effect", 24, "--fault.location=k", f"--fault.layer_mode={mode}")
    plan = make_plan(config)
    first = {run.run_id: pairs.drawing.draw(run, config) for run in plan.runs}
    # Nothing is kept from one draw to the next, and the order is another.
    monkeypatch.setattr(clean_sites, "KEPT_BYTES", 0)
    monkeypatch.setattr(aim, "KEPT_POOLS", 0)
    for run in reversed(plan.runs):
        again = pairs.drawing.draw(run, config)
        known = first[run.run_id]
        assert (again.faults, again.sampling_weight) == (known.faults, known.sampling_weight)
        assert len(again.faults) == (2 if mode == "all" else 1)
    assert len({run.sampling_weight for run in first.values()}) > 10


@pytest.mark.parametrize("kind", ["zero", "random_value", "stuck_at_1"])
def test_other_kinds_are_aimed_too(pairs: PairedRunner, place: MicroPlace, kind: str) -> None:
    found = draws(pairs, config_of(place, "effect", 200, "--fault.location=v", f"--fault.kind={kind}"))
    assert {run.faults[0].kind for run in found} == {kind}
    assert agrees(np.array([run.sampling_weight for run in found]), 1.0)


@pytest.mark.parametrize("chosen", ["bits", "effect"])
def test_engines_and_shards_give_the_same_rows(place: MicroPlace, tmp_path: Path, chosen: str) -> None:
    more = ["--num_runs=20", "--data.seq_len=20", f"--fault.aim={chosen}", "--sweep.fault.location=q,weights"]
    options = [*more, "--fault.bit=null", "--detect.detectors=[finite]"]
    assert main(place.arguments(tmp_path / "plain", *options, "--run.engine=plain")) == 0
    for shard in ("2/2", "1/2"):
        assert main(place.arguments(tmp_path / "fast", *options, "--run.engine=fast", f"--shard={shard}")) == 0
    fast, plain = tmp_path / "fast" / "micro", tmp_path / "plain" / "micro"
    assert main(["merge", str(fast)]) == 0
    assert numbers(fast / "runs.csv") == numbers(plain / "runs.csv")
    weights = {row["sampling_weight"] for row in table(plain / "runs.csv")}
    assert len(weights) > (1 if chosen == "bits" else 30)
    run_id = table(plain / "runs.csv")[7]["run_id"]
    assert main(["replay", str(plain), run_id]) == 0


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("options", "message"), [
    (["--fault.bit=null", "--fault.aim=efect"],
     "fault.aim: got 'efect', allowed uniform, bits, effect; did you mean 'effect'"),
    (["--fault.bit=3", "--fault.aim=bits"], "fault.aim: got 'bits', allowed only where a bit is drawn"),
    (["--sweep.fault.bit=null,3", "--fault.aim=bits"], "fault.aim: got 'bits', allowed only where a bit is drawn"),
    (["--fault.bit=null", "--fault.kind=zero", "--fault.aim=bits"], "fault.aim: got 'bits', .*got zero"),
    (["--fault.bit=null", "--fault.kind=bit_error_rate", "--fault.rate=0.1", "--fault.aim=effect"],
     "fault.aim: got 'effect', allowed uniform where fault.kind is bit_error_rate"),
])  # fmt: skip
def test_aims_that_cannot_be_meant_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        load_config(options)


def test_a_bit_that_is_given_cannot_be_aimed_at() -> None:
    with pytest.raises(ValueError, match=r"fault.aim: got 'bits', allowed only where fault.bit is open, got \(3,\)"):
        draw_by_bits(FaultSpec("q", bits=(3,)), SITES, np.random.default_rng(0))
