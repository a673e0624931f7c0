from __future__ import annotations

import math
import statistics
import time
from typing import Any

import pytest
import torch
from fresh_memory import touch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import monitoring
from monitoring.performance.aggregator import PerformanceAggregator
from monitoring.performance.flops import counted_forward_flops
from monitoring.performance.metrics import PHASES, PerformanceMetrics
from monitoring.performance.monitor import PerformanceMonitor, paired_order


class Clock:
    """A clock that advances by hand, so that durations are known exactly."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(time, "perf_counter", hand)
    return hand


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=50, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


def test_package_exports() -> None:
    assert monitoring.PerformanceMonitor is PerformanceMonitor
    assert monitoring.PerformanceMetrics is PerformanceMetrics
    assert monitoring.PerformanceAggregator is PerformanceAggregator
    assert monitoring.ForwardCache.__module__ == "monitoring.cache.forward_cache"
    assert monitoring.TraceWriter.__module__ == "monitoring.trace.trace_writer"


def test_timers_nest_and_accumulate(clock: Clock) -> None:
    monitor = PerformanceMonitor()
    with monitor.timer("total"):
        clock.now += 1
        for _ in range(2):
            with monitor.timer("injection_forward"):
                clock.now += 4
                with monitor.timer("bounds_computation"):
                    clock.now += 2
        with monitor.timer("baseline_forward_time"):  # the field's spelling
            clock.now += 8
    metrics = monitor.metrics
    assert metrics.total_time == 21
    assert metrics.injection_forward_time == 12
    assert metrics.bounds_computation_time == 4
    assert metrics.baseline_forward_time == 8
    assert metrics.violation_detection_time is None
    assert (metrics.baseline_passes, metrics.injection_passes) == (1, 2)


def test_a_phase_within_itself_is_counted_once(clock: Clock) -> None:
    monitor = PerformanceMonitor()
    with monitor.timer("injection_forward"):
        clock.now += 1
        with monitor.timer("injection_forward"):
            clock.now += 2
        clock.now += 4
    assert monitor.metrics.injection_forward_time == 7
    assert monitor.metrics.injection_passes == 1


@pytest.mark.parametrize("phase", PHASES)
def test_time_is_recorded_after_an_exception(phase: str, clock: Clock) -> None:
    monitor = PerformanceMonitor()

    def fail_after(seconds: float) -> None:
        with monitor.timer(phase):
            clock.now += seconds
            raise KeyError

    for _ in range(2):  # the second use shows that the first one was closed
        with pytest.raises(KeyError):
            fail_after(3)
    assert monitor.metrics.to_dict()[f"{phase}_time"] == 6


def test_add_time_and_reset() -> None:
    monitor = PerformanceMonitor()
    monitor.add_time("baseline_forward", 0.5)
    monitor.add_time("injection_forward", 0.75)
    monitor.record_memory()
    assert monitor.metrics.injection_vs_baseline == 50.0
    monitor.reset()
    assert monitor.metrics == PerformanceMetrics()


def test_wrong_use_is_refused() -> None:
    monitor = PerformanceMonitor()
    expected = r"timer: got 'basline_forward', allowed: total, .*; did you mean 'baseline_forward'\?"
    with pytest.raises(ValueError, match=expected), monitor.timer("basline_forward"):
        pass
    with pytest.raises(ValueError, match=r"timer: got 'zzz', allowed: .*detection$"), monitor.timer("zzz"):
        pass
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"seconds of total: got {seconds}, allowed: a finite number"):
            monitor.add_time("total", seconds)
    with pytest.raises(RuntimeError, match=r"call record_model_info\(model, batch\) first"):
        monitor.estimate_flops()
    monitor.record_model_info(tiny_gpt2(), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"checked_layers: got 4, allowed: 0..3"):
        monitor.estimate_flops(checked_layers=4)
    with pytest.raises(ValueError, match=r"device: got 'meta', allowed: 'cpu', 'cuda'"):
        PerformanceMonitor("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_missing_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'cuda', but torch.cuda.is_available\(\) is False"):
        PerformanceMonitor("cuda")


def test_cuda_is_synchronised_before_every_reading_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the device: the order of calls is what matters, and it shows on any machine."""
    calls: list[str] = []
    megabyte = 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"synchronize {device}"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * megabyte)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * megabyte)
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append("clock") or 0.0)
    monitor = PerformanceMonitor("cuda:1")
    with monitor.timer("total"):
        calls.append("work")
    assert calls == ["reset", "synchronize cuda:1", "clock", "work", "synchronize cuda:1", "clock"]
    monitor.record_memory()
    metrics = monitor.metrics
    assert (metrics.peak_memory_allocated_mb, metrics.peak_memory_reserved_mb) == (3.0, 5.0)
    assert metrics.peak_memory_mb == 3.0
    assert metrics.resident_memory_mb is None
    assert metrics.peak_resident_memory_mb is None


def test_a_device_that_fails_within_the_block_still_closes_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: Any) -> None:
        raise RuntimeError("device-side assert")

    monitor = PerformanceMonitor()
    with pytest.raises(RuntimeError, match="device-side assert"), monitor.timer("total"):
        monkeypatch.setattr(monitor, "_synchronize", lambda: broken(None))
    monkeypatch.undo()
    assert monitor.metrics.total_time is not None
    with monitor.timer("total"):
        pass
    assert monitor._uses["total"] == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    monitor = PerformanceMonitor("cuda")
    with monitor.timer("baseline_forward"):
        torch.ones(64, 2**20, device="cuda").sum()
    monitor.record_memory()
    assert monitor.metrics.baseline_forward_time > 0
    assert monitor.metrics.peak_memory_allocated_mb >= 256
    assert monitor.metrics.peak_memory_reserved_mb >= monitor.metrics.peak_memory_allocated_mb


def test_memory_on_a_cpu_is_the_resident_set() -> None:
    monitor = PerformanceMonitor("cpu")
    assert monitor.metrics.peak_memory_mb is None
    assert monitor.record_memory().peak_resident_mb is None  # nothing was timed yet
    start = monitor.metrics.resident_memory_mb
    with monitor.timer("total"), monitor.timer("injection_forward"):
        touch(48)
    monitor.record_memory()
    metrics = monitor.metrics
    assert metrics.peak_resident_memory_mb - start > 0.9 * 48
    assert metrics.peak_memory_mb == metrics.peak_resident_memory_mb
    assert metrics.peak_memory_allocated_mb is None
    assert metrics.peak_memory_reserved_mb is None


def test_model_info_and_flops() -> None:
    model, ids = tiny_gpt2(), torch.zeros(2, 10, dtype=torch.long)
    monitor = PerformanceMonitor()
    monitor.record_model_info(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert monitor.metrics.attention_flops is None
    estimate = monitor.estimate_flops(checked_layers=1)
    monitor.add_time("baseline_forward", 1e-3)
    monitor.add_time("baseline_forward", 3e-3)
    metrics = monitor.metrics
    assert (metrics.num_layers, metrics.num_heads, metrics.head_dim) == (3, 4, 8)
    assert (metrics.batch_size, metrics.seq_len) == (2, 10)
    assert metrics.attention_flops == 3 * 4 * (2 * 4 * 10 * 10 * 8)
    assert metrics.bounds_flops == (2 * 4 * 10) * (5 * 10 + 14)
    assert metrics.forward_flops == pytest.approx(counted_forward_flops(model, ids), rel=0.01)
    assert metrics.total_flops == metrics.forward_flops + metrics.bounds_flops
    assert metrics.effective_tflops == pytest.approx(metrics.forward_flops / 2e-3 / 1e12)
    assert estimate == {name: metrics.to_dict()[name] for name in estimate}


def test_no_formula_means_none() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 16, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    monitor = PerformanceMonitor()
    monitor.record_model_info(model, torch.zeros(2, 6, dtype=torch.long))
    assert set(monitor.estimate_flops().values()) == {None}
    assert monitor.metrics.head_dim == 4
    assert monitor.metrics.total_flops is None


def test_overheads() -> None:
    metrics = PerformanceMetrics(
        total_time=10.0,
        baseline_forward_time=4.0,
        injection_forward_time=5.0,
        bounds_computation_time=0.5,
        violation_detection_time=0.25,
    )
    assert metrics.injection_vs_baseline == 25.0
    assert metrics.detection_vs_baseline == 18.75
    assert metrics.total_vs_baseline == 150.0
    twice = PerformanceMetrics(**{**vars(metrics), "baseline_passes": 2, "injection_passes": 1})
    assert twice.injection_vs_baseline == 150.0  # 5 s a pass against 2 s a pass
    assert twice.detection_vs_baseline == 37.5
    assert twice.total_vs_baseline == 150.0


@pytest.mark.parametrize("baseline", [None, 0.0])
def test_overheads_without_a_baseline_are_none(baseline: float | None) -> None:
    times = {"total_time": 3.0, "injection_forward_time": 2.0, "bounds_computation_time": 1.0}
    numbers = PerformanceMetrics(baseline_forward_time=baseline, forward_flops=10, **times).to_dict()
    for name in ("injection_vs_baseline", "detection_vs_baseline", "total_vs_baseline", "effective_tflops"):
        assert numbers[name] is None
    assert PerformanceMetrics(baseline_forward_time=1.0).detection_vs_baseline is None
    assert PerformanceMetrics(baseline_forward_time=1.0).injection_vs_baseline is None


def test_summary_shows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = PerformanceMonitor()
    monitor.add_time("baseline_forward", 0.5)
    monitor.record_model_info(tiny_gpt2(), torch.zeros(2, 10, dtype=torch.long))
    monitor.estimate_flops()
    monitor.print_summary()
    printed = capsys.readouterr().out
    assert printed == monitor.summary() + "\n" == monitor.metrics.summary() + "\n"
    lines = printed.splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == ["Time", "Memory", "Model", "FLOPs", "Overheads"]
    shown = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(" ")}
    assert shown["baseline_forward_time"] == ["0.5", "s"]
    assert shown["injection_forward_time"] == ["-", "s"]
    assert shown["attention_flops"] == ["76,800"]
    elsewhere = {"baseline_passes", "injection_passes", "peak_memory_mb"}  # the last repeats another
    assert set(shown) == set(PerformanceMetrics().to_dict()) - elsewhere


def test_paired_order_is_seeded_and_balanced() -> None:
    draws = [paired_order(torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert set(draws) == {("baseline", "injected"), ("injected", "baseline")}
    generator = torch.Generator().manual_seed(1)
    first = [paired_order(generator) for _ in range(400)]
    again = torch.Generator().manual_seed(1)
    assert first == [paired_order(again) for _ in range(400)]
    assert 140 < first.count(("baseline", "injected")) < 260  # six standard deviations around 200


values = st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(values, max_size=20))
def test_statistics_agree_with_the_standard_library(times: list[float | None]) -> None:
    aggregator = PerformanceAggregator()
    for seconds in times:
        aggregator.add(PerformanceMetrics(total_time=seconds))
    finite = [seconds for seconds in times if seconds is not None and math.isfinite(seconds)]
    found = aggregator.compute_statistics()["total_time"]
    assert (found["n"], found["missing"]) == (len(finite), len(times) - len(finite))
    assert len(aggregator) == len(times)
    if not finite:
        assert {found[name] for name in ("mean", "std", "min", "max", "median")} == {None}
        return
    assert (found["min"], found["max"]) == (min(finite), max(finite))
    assert found["mean"] == pytest.approx(statistics.fmean(finite), rel=1e-9, abs=1e-9)
    assert found["median"] == pytest.approx(statistics.median(finite), rel=1e-9, abs=1e-9)
    if len(finite) == 1:
        assert found["std"] is None
    else:
        assert found["std"] == pytest.approx(statistics.stdev(finite), rel=1e-9, abs=1e-9)


def test_statistics_cover_derived_numbers_and_print(capsys: pytest.CaptureFixture[str]) -> None:
    aggregator = PerformanceAggregator()
    aggregator.add(PerformanceMetrics(baseline_forward_time=1.0, injection_forward_time=1.5))
    aggregator.add(PerformanceMetrics(baseline_forward_time=1.0, injection_forward_time=2.5))
    aggregator.add(PerformanceMetrics(injection_forward_time=9.0))
    found = aggregator.compute_statistics()
    assert list(found) == list(PerformanceMetrics().to_dict())
    assert found["injection_vs_baseline"] == {
        "mean": 100.0,
        "std": pytest.approx(math.sqrt(5000)),
        "min": 50.0,
        "max": 150.0,
        "median": 100.0,
        "n": 2,
        "missing": 1,
    }
    aggregator.print_statistics()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Performance of 3 run(s)"
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["injection_vs_baseline"] == ["100", "70.7107", "50", "100", "150", "2", "1"]
    assert "violation_detection_time" not in rows  # no run has it


def test_aggregator_refuses_other_objects() -> None:
    with pytest.raises(TypeError, match=r"got PerformanceMonitor, allowed: PerformanceMetrics"):
        PerformanceAggregator().add(PerformanceMonitor())  # type: ignore[arg-type]
