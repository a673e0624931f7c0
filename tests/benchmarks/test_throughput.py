"""``benchmarks.throughput`` runs, says what it should, and its ways agree; its floor against counts by hand."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from benchmarks import detectors, measuring, memory, throughput
from benchmarks.floor import least_work
from benchmarks.plain_check import PlainCheck
from benchmarks.variants import Counts, make_variants
from benchmarks.workloads import Workload, build_model
from fault_injection import FaultSpec, draw_fault
from fault_injection.faults.spec import ElementIndex
from monitoring.performance.flops import forward_flops

WAYS = {
    "naive_pair", "naive_pair_with_outcome", "cached_baseline", "resume", "batched", "rows", "everything",
    "everything_default", "site_none", "site_lite", "site_default",
}  # fmt: skip


def run(module, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.main(["--quick", "--json", *arguments])
    return [json.loads(line) for line in printed.getvalue().splitlines()]


@pytest.fixture(scope="module")
def measured():
    (found,) = run(throughput, "--rounds", "1")
    return found


def test_one_object_says_machine_shape_and_every_way(measured):
    assert measured["shape"] == [2, 48]
    assert measured["dtype"] == "float32"
    assert {"cpu", "threads", "torch", "capability"} <= measured["machine"].keys()
    assert measured["machine"]["threads"] == 1
    assert measured["variants"].keys() == WAYS
    for facts in measured["variants"].values():
        assert facts["runs_per_second"] == pytest.approx(1 / facts["seconds_per_run"])
        assert facts["speedup_over_naive_pair"] > 0
    assert measured["variants"]["naive_pair"]["speedup_over_naive_pair"] == 1.0
    assert measured["shared"]["default"].keys() == {"baseline_seconds", "recording_seconds", "proof_seconds"}


def test_every_way_is_bitwise_equal_to_the_plain_pass(measured):
    assert {name: facts["bitwise_equal"] for name, facts in measured["variants"].items()} == dict.fromkeys(WAYS, True)
    assert all(facts["runs_compared"] >= 4 for facts in measured["variants"].values())


def test_table_has_a_line_a_way(measured, capsys):
    throughput.print_table(measured)
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in WAYS)
    assert "NOT" not in printed
    measured["variants"]["rows"]["bitwise_equal"] = False
    throughput.print_table(measured)
    measured["variants"]["rows"]["bitwise_equal"] = True
    assert "NOT bitwise equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shape", "64"], "got '64', allowed B,T"), (["--shape", "0,64"], "allowed at least 1,2")],
)
def test_shapes_that_are_none_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_numbers_of_runs_that_do_not_divide_are_refused():
    with pytest.raises(SystemExit, match="got 24, allowed powers of two from 16 on"):
        throughput.main(["--quick", "--runs", "24"])
    with pytest.raises(ValueError, match="model: got 'gpt3', allowed gpt2-small"):
        build_model("gpt3", "float32")


@pytest.mark.parametrize("model", ["gpt2-small", "llama"])
def test_check_notices_what_differs_and_the_floor_is_the_count_by_hand(model):
    with Workload.of(model, "float32", (2, 20), quick=True) as work:
        opened = {"none": work.opened(()), "default": work.opened(("lite",))}
        (fault,) = work.faults(1, layer=1)
        (found,) = make_variants(work, opened, Counts.of(16))["everything_default"].execute([fault])
        check = PlainCheck(work)
        assert check.differing(fault, found) is None
        other = dataclasses.replace(found.effect, injected_loss=0.0)
        assert check.differing(fault, dataclasses.replace(found, effect=other)) == "effect"
        name, verdict = next(iter(found.verdicts.items()))
        wrong = {name: dataclasses.replace(verdict, violations=verdict.violations + 1)}
        assert check.differing(fault, dataclasses.replace(found, verdicts=wrong)) == name
        floor_by_hand(work, opened["none"].recording, mlp=8 if model == "gpt2-small" else 3 * (8 * 128 // 3) / 128)


def floor_by_hand(work, recording, mlp):
    """A query and a value, in the last layer but one, from row 17 of 20 on; ``mlp`` in units of width ** 2."""
    sites, width, vocabulary = work.baseline(()).sites, 128, 2000
    random = np.random.default_rng(0)
    query = draw_fault(FaultSpec("q", index=ElementIndex(row=17)), sites[2, "q"], random)
    value = draw_fault(FaultSpec("v", index=ElementIndex(row=17)), sites[2, "v"], random)
    pair = 2.0 * forward_flops(work.subject.model, work.batch)
    projections = 2 + 2 * sites[2, "v"].shape[1] / 4  # two heads of llama's keys and values for four of queries
    for fault, touched in ((query, 1), (value, 3)):
        least = least_work(work, recording, [fault], [False])
        assert least.pair == pair
        assert least.site == touched * 2 * (1 + mlp) * width**2
        assert least.behind == 3 * 2 * (projections + mlp) * width**2 + (18 + 19 + 20) * 4 * width
        assert least.head == 3 * 2 * width * vocabulary
    half = least_work(work, recording, [query, query], [False, True])
    assert half.run == least_work(work, recording, [query], [False]).run / 2


def test_rounds_rotate_and_ratios_are_taken_within_rounds(monkeypatch):
    seen, clock = [], iter([0, 1, 1, 3, 3, 13, 13, 18])
    monkeypatch.setitem(measuring.CLOCKS, "wall", lambda: float(next(clock)))
    variants = {name: lambda number, name=name: seen.append((name, number)) for name in ("a", "b")}
    seconds = measuring.alternate(variants, 2)
    assert seen == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert seconds == {"a": [1.0, 5.0], "b": [2.0, 10.0]}
    assert measuring.medians(seconds) == {"a": 3.0, "b": 6.0}
    assert measuring.ratio_to(seconds, "a") == {"a": 1.0, "b": 2.0}


def test_detector_suites_have_an_overhead_and_a_site_step():
    (found,) = run(detectors, "--suites", "lite,default", "--rounds", "1")
    assert found["forward"].keys() == {"plain", "watched", "lite", "default"}
    assert found["site_step"].keys() == {"none", "lite", "default"}
    assert found["forward"]["plain"]["overhead"] == 0.0
    assert all(facts["seconds_per_run"] > 0 for facts in found["site_step"].values())


def test_a_false_alarm_ends_the_measurement_of_detectors(monkeypatch):
    with Workload.of("gpt2-small", "float32", (1, 20), quick=True) as work:
        watched = detectors._watched(work, ("O_row",))
        watched(0)
        monkeypatch.setattr("bounds.core.verdict.Verdict.fired", property(lambda self: True))
        with pytest.raises(RuntimeError, match="false positives"):
            watched(0)


@pytest.mark.slow
def test_memory_of_a_campaign_stands_beside_that_of_a_pass():
    (found,) = run(memory)
    assert found["forward"]["peak_bytes"] > found["forward"]["libraries_bytes"] > 2**26
    assert found["ratio"] == found["campaign"]["peak_bytes"] / found["forward"]["peak_bytes"] > 1.0
    assert found["campaign"]["executions"]["rows"] > 32
    # Four layers of inputs, operands and outputs (2, 48, 128), twice the rest, and the logits.
    least = 2 * 48 * (5 * 128 + 4 * 4 * 128 + 2000) * torch.float32.itemsize
    assert least <= found["campaign"]["recording_bytes"] < 10 * least
