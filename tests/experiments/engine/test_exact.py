"""The acceptance of the fast engine: every number of a run is that of the plain pair, to the last bit.

``Place.compare`` says what that means: all rows of the output, loss, effect, what the fault hit, the verdicts of all
detectors in every layer, and the local change; where a fault leaves the fast path, the same of a resumed pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from engine_places import (
    CRITICAL,
    Place,
    integer_view,
    opened_place,
    padded,
    small_bert,
    small_gpt2,
    small_llama,
    tokens,
)
from torch import nn

from experiments.engine.fast import engine as fast_engine
from experiments.engine.fast import propagation
from experiments.engine.fast.front import EngineMismatchError
from experiments.engine.fast.propagation import Wave
from experiments.engine.fast.run import FastRun
from fault_injection import LOCATIONS, ElementIndex, Fault
from fault_injection.numbers.bits import float_format


def labelled(batch: Any) -> dict[str, torch.Tensor]:
    return {**batch, "labels": batch["input_ids"]}


PLACES: dict[str, Callable[[], tuple[Any, Any, str]]] = {
    "gpt2": lambda: (small_gpt2(), {"input_ids": tokens()}, "causal"),
    "gpt2-right-padded": lambda: (small_gpt2(), padded("right"), "causal"),
    "gpt2-left-padded": lambda: (small_gpt2(), padded("left"), "causal"),
    "gpt2-bfloat16": lambda: (small_gpt2().bfloat16(), padded("right"), "causal"),
    "gpt2-wide-head": lambda: (small_gpt2(vocab_size=9000), {"input_ids": tokens(2)}, "causal"),
    "llama": lambda: (small_llama(), {"input_ids": tokens(2)}, "causal"),
    "llama-left-padded-bfloat16": lambda: (small_llama().bfloat16(), padded("left"), "causal"),
    "bert": lambda: (small_bert(), labelled(padded("right")), "masked"),
    "bert-encoder": lambda: (small_bert(transformers.BertModel), {"input_ids": tokens(2, 33)}, "encoder"),
}
MAIN = ("gpt2-right-padded", "llama")


SLOW = ("gpt2", "gpt2-bfloat16")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PLACES]
)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    model, batch, family = PLACES[request.param]()
    with opened_place(model, [batch], family) as opened:
        yield opened


def highest_exponent_bit(fault: Fault) -> int:
    # 30 in float32, 14 in bfloat16.
    return float_format(fault.torch_dtype).width - 2


def mixed(place: Place, location: str, count: int) -> list[Fault]:
    """Return faults of a location: any bit, the highest bit of the exponent, and random patterns."""
    third = count // 3
    bit = highest_exponent_bit(place.draw(location, 1)[0])
    return [
        *place.draw(location, count - 2 * third),
        *place.draw(location, third, bits=(bit,), seed=1),
        *place.draw(location, third, kind="random_value", seed=2),
    ]


def test_the_groups_of_heads_say_what_the_calls_say(place: Place) -> None:
    assert place.opened.groups is not None
    assert place.opened.differing_verdict(place.baseline) is None
    assert {name for name, _ in place.opened.groups.whole()} >= {"finite", "P_q", "s@w", "oracle_s@w", "O_hull", "KV"}


def test_random_faults_of_every_location(place: Place, request: pytest.FixtureRequest) -> None:
    """All in one list, so that packs mix layers, sequences and locations."""
    count = 25 if request.node.callspec.params["place"] in MAIN else 9
    faults = [fault for location in LOCATIONS for fault in mixed(place, location, count)]
    wide = place.baseline.evaluation.output.shape[-1] > 8192
    compared = place.compare(faults, place.engine(wide=wide))
    assert 0 < compared.escaped < len(faults) / 2
    assert {"benign", "critical", "nonfinite"} < {*compared.outcomes, "masked"}
    for number, location in enumerate(LOCATIONS):
        # Some of each location stay on the fast path and reach the output.
        runs = compared.runs[count * number : count * (number + 1)]
        assert any(run is not None and run.effect.outcome != "masked" for run in runs), location
    fired = {name for run in compared.runs if run for name, verdict in run.verdicts.items() if verdict.fired}
    assert {"P_q", "P_k", "P_v", "S_row", "W_sum", "O_row"} <= fired
    # Behind the last attention nothing needs to be watched.
    last = len(place.pairs.subject.cores) - 1
    assert all(run is not None for fault, run in zip(faults, compared.runs, strict=True) if fault.layer == last)


# ------------------------------------------------------------------------------- the same runs in other packs


@pytest.fixture(scope="module")
def llama() -> Iterator[Place]:
    with opened_place(small_llama(), [{"input_ids": tokens(2)}]) as opened:
        yield opened


def numbers(runs: list[FastRun]) -> list[Any]:
    return [repr(replace(run, seconds=0.0)) for run in runs]


def test_the_numbers_of_a_run_do_not_depend_on_its_pack(llama: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [fault for location in LOCATIONS for fault in mixed(llama, location, 6)]
    sites = [(llama.engine().site_of(fault), True) for fault in faults]
    together = numbers(llama.engine().run(sites, CRITICAL))
    assert together.count(None) < len(faults) / 2
    for batch_runs in (1, 3):
        assert numbers(llama.engine(batch_runs).run(sites, CRITICAL)) == together
    backwards = numbers(llama.engine().run(sites[::-1], CRITICAL))
    assert backwards[::-1] == together
    # Small pieces everywhere: of site steps, of attention batches, of the head.
    monkeypatch.setattr(fast_engine, "SITE_ELEMENTS", 1)
    monkeypatch.setattr(fast_engine, "HEAD_ROWS", 1)
    monkeypatch.setattr(propagation, "ATTENTION_ELEMENTS", 1)
    assert numbers(llama.engine().run(sites, CRITICAL)) == together


def test_at_most_so_many_runs_go_together(llama: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = fast_engine.FastEngine._propagate
    monkeypatch.setattr(
        fast_engine.FastEngine,
        "_propagate",
        lambda engine, runs, critical, whole: sizes.append(len(runs)) or own(engine, runs, critical, whole),
    )
    sites = [(llama.engine().site_of(fault), True) for fault in llama.draw("out", 20, bits=(22,))]
    llama.engine(batch_runs=3).run(sites, CRITICAL)
    assert max(sizes) == 3
    assert sum(sizes) == 20
    sizes.clear()
    llama.engine().run(sites, CRITICAL)
    assert max(sizes) > 3


def test_a_run_that_is_not_propagated_has_no_effect_unless_it_is_masked(llama: Place) -> None:
    faults = llama.draw("weights", 40)
    sites = [llama.engine().site_of(fault) for fault in faults]
    whole = llama.engine().run([(site, True) for site in sites], CRITICAL)
    local = llama.engine().run([(site, False) for site in sites], CRITICAL)
    unmoved = 0
    for fault, one, other in zip(faults, whole, local, strict=True):
        assert other is not None
        injected = llama.plain(fault, keep_output=True)
        moved = other.local.largest != 0.0 or other.local.relative != 0.0
        unmoved += not moved
        if moved:
            assert other.effect is None
        else:
            assert other.effect is not None
            assert (other.effect.outcome, other.effect.injected_loss) == ("masked", injected.evaluation.loss)
        if one is not None:
            assert repr((one.local, one.verdicts, one.record)) == repr((other.local, other.verdicts, other.record))
    assert 0 < unmoved < len(faults)


# --------------------------------------------------------------------------------------------- other faults


def test_hidden_keys_are_hit_too(llama: Place) -> None:
    faults = llama.draw("scores", 30, include_masked=True) + llama.draw("weights", 30, include_masked=True)
    assert sum(fault.masked_position for fault in faults) > 10
    compared = llama.compare(faults)
    assert "masked" in compared.outcomes


@pytest.mark.parametrize("location", LOCATIONS)
def test_many_errors_in_one_head(llama: Place, location: str) -> None:
    where = ElementIndex(batch=1, head=1)
    faults = llama.draw(location, 5, kind="bit_error_rate", rate=2e-3, index=where)
    assert max(len(fault.elements) for fault in faults) > 1
    compared = llama.compare(faults)
    assert any(len({run.record.fault.index[2]}) for run in compared.runs if run is not None)


@pytest.mark.parametrize("kind", ["stuck_at_0", "stuck_at_1", "zero"])
def test_other_kinds(llama: Place, kind: str) -> None:
    llama.compare([fault for location in LOCATIONS for fault in llama.draw(location, 3, kind=kind)])


def test_without_detectors(llama: Place) -> None:
    with opened_place(small_llama(), [{"input_ids": tokens(2)}], detectors=[]) as place:
        assert place.opened.groups is None
        compared = place.compare(place.draw("k", 10))
        assert all(run.verdicts == {} for run in compared.runs if run is not None)


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_numbers_of_any_size_behind_the_fault(make: Callable[[], Any]) -> None:
    """Without norms queries and keys grow with the fault: their products overflow, and reach rows in front of it."""
    model = make()
    for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        name = "ln_1" if hasattr(block, "ln_1") else "input_layernorm"
        setattr(block, name, Scaled(0.3))
    with opened_place(model, [{"input_ids": tokens(2)}], detectors=["finite", "s@w"]) as place:
        faults = place.draw("out", 60, kind="random_value", index=ElementIndex(row=20))
        compared = place.compare(faults)
    kept = [run.local.largest for run in compared.runs if not run.behind]
    assert compared.escaped > 5
    assert sum(change > 1e6 for change in kept) > 3


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.factor


# --------------------------------------------------------------------------------------------- what must be noticed


def test_a_wrong_belief_in_causality_is_noticed() -> None:
    """The comparison itself: an engine that leaves rows out is not equal."""
    with opened_place(small_bert(), [labelled({"input_ids": tokens()})], "masked") as place:
        assert not place.opened.causal
        with pytest.raises((AssertionError, EngineMismatchError)):
            place.compare(place.draw("out", 10, bits=(29,)), place.engine(causal=True))


def test_a_change_of_the_last_bit_is_noticed(llama: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Wave.head

    def off(wave: Wave, hidden: torch.Tensor) -> torch.Tensor:
        logits = own(wave, hidden).clone()
        integer_view(logits)[0, 5] ^= 1
        return logits

    monkeypatch.setattr(Wave, "head", off)
    with pytest.raises(AssertionError):
        llama.compare(llama.draw("out", 3, bits=(29,)))


def test_control_rows_are_watched_in_every_pass(llama: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [(llama.engine().site_of(fault), True) for fault in llama.draw("out", 3, bits=(29,), index=ElementIndex())]
    own_head, own_block = Wave.head, Wave._block

    def last_row_off(rows: torch.Tensor) -> torch.Tensor:
        changed = rows.clone()
        integer_view(changed)[-1, 0] ^= 1
        return changed

    with monkeypatch.context() as patch:
        patch.setattr(Wave, "head", lambda wave, hidden: last_row_off(own_head(wave, hidden)))
        with pytest.raises(EngineMismatchError, match="rows without a fault changed in the head"):
            llama.engine().run(sites, CRITICAL)
    with monkeypatch.context() as patch:
        patch.setattr(Wave, "_block", lambda wave, number, *rest: last_row_off(own_block(wave, number, *rest)))
        with pytest.raises(EngineMismatchError, match=r"rows without a fault changed in block \d"):
            llama.engine().run(sites, CRITICAL)
    with monkeypatch.context() as patch:
        patch.setattr(Wave, "through", lambda wave, number, pack, hidden: last_row_off(hidden))
        with pytest.raises(EngineMismatchError, match=r"rows without a fault changed in front of block \d"):
            llama.engine().run(sites, CRITICAL)


# --------------------------------------------------------------------------------------------- many


@pytest.mark.slow
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("name", ["gpt2-right-padded", "llama"])
def test_five_hundred_faults(name: str, location: str) -> None:
    model, batch, family = PLACES[name]()
    with opened_place(model, [batch], family) as place:
        compared = place.compare(mixed(place, location, 500))
        assert set(compared.outcomes) == {"masked", "benign", "critical", "nonfinite"}
        assert 0 < compared.escaped < 250


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 17, 31, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_other_lengths(make: Callable[[], Any], dtype: torch.dtype, length: int) -> None:
    with opened_place(make().to(dtype), [{"input_ids": tokens(2, length)}]) as place:
        place.compare([fault for location in LOCATIONS for fault in mixed(place, location, 40)])
