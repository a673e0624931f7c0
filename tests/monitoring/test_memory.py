from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from fresh_memory import touch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from monitoring.performance import memory
from monitoring.performance.memory import BYTES_PER_MB, MemoryWatch, ResidentPeak, resident_bytes, tensor_peak

KB = 1000  # float32 elements are 4 bytes, so torch.empty(KB) is 4,000 bytes
LARGE_MB = 48

needs_high_water = pytest.mark.skipif(not memory.high_water_works(), reason="no resettable VmHWM here")


def test_peak_of_a_hand_computed_sequence() -> None:
    outside = torch.empty(50 * KB)

    def steps() -> torch.Tensor:
        first = torch.empty(KB)  # 4
        second = torch.empty(2 * KB)  # 12
        del first  # 8
        third = torch.empty(KB // 2)  # 10
        view = second[:10]  # a view is no storage
        del second  # still 10: the view holds it
        fourth = outside + 0.0  # 210: a new storage; outside itself is not counted
        del view, third, fourth  # 0
        return torch.empty(3 * KB)  # 12

    assert tensor_peak(steps) == 210 * KB


def test_in_place_and_views_add_nothing_and_out_resizes() -> None:
    def steps() -> None:
        held = torch.zeros(KB)
        held.add_(1.0).mul_(2.0)
        held.view(10, 100).t().reshape(1000)[3:].relu_()  # the transpose copies: 8

    assert tensor_peak(steps) == 8 * KB

    def grows() -> None:
        target = torch.empty(0)
        torch.add(torch.ones(KB), 1.0, out=target.resize_(KB))
        target.resize_(4 * KB)  # the ones have died: 16

    assert tensor_peak(grows) == 16 * KB


def test_what_the_autograd_graph_saves_is_alive() -> None:
    start = torch.ones(KB, requires_grad=True)

    def saved() -> torch.Tensor:
        first = start.exp()
        second = first.exp()
        del first  # exp saves its result
        return second * 2.0

    def dropped() -> torch.Tensor:
        with torch.no_grad():
            return saved()

    assert tensor_peak(saved) == 12 * KB
    assert tensor_peak(dropped) == 8 * KB


def test_result_and_arguments() -> None:
    given = torch.ones(KB)
    assert tensor_peak(torch.add, given, given, alpha=2) == 4 * KB
    assert tensor_peak(given.add_, 1.0) == 0
    assert tensor_peak(lambda: torch.empty(KB, device="meta")) == 0


def test_exception_leaves_no_mode_behind() -> None:
    with pytest.raises(ZeroDivisionError):
        tensor_peak(lambda: 1 / 0)
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=50,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def profiled_peak(call: Any) -> int:
    """The allocator's own record of the call: an oracle that knows nothing of dispatch modes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    allocations = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            allocations.append(event)
    sizes: dict[int, int] = {}
    peak = 0
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        size, pointer = event.extra_fields.alloc_size, event.extra_fields.ptr
        if size > 0:
            sizes[pointer] = size
        else:
            sizes.pop(pointer, None)
        peak = max(peak, sum(sizes.values()))
    return peak


def test_model_pass_agrees_with_the_allocators_record() -> None:
    model = tiny_llama()
    ids = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        peaks = {tensor_peak(model, ids) for _ in range(3)}
        oracle = profiled_peak(lambda: model(ids))
    assert len(peaks) == 1
    assert peaks.pop() == pytest.approx(oracle, rel=0.01)
    assert oracle > 2 * 4 * 64 * 64 * 4  # one layer's weights, (B, H, T, S) in float32


@pytest.mark.parametrize("method", [pytest.param("high_water", marks=needs_high_water), "sampled"])
def test_resident_peak_sees_memory_that_is_gone_at_the_end(method: str) -> None:
    with ResidentPeak(method=method) as block:
        before = resident_bytes()
        held = touch(LARGE_MB)
        time.sleep(0.05)
        del held
    after = resident_bytes()
    assert block.peak_bytes - before > 0.9 * LARGE_MB * BYTES_PER_MB
    assert block.peak_bytes - after > 0.9 * LARGE_MB * BYTES_PER_MB
    ended = block.peak_bytes
    touch(2 * LARGE_MB)
    assert block.peak_bytes == ended
    assert not [thread for thread in threading.enumerate() if thread.name == "resident-peak"]


def heap_with_holes() -> torch.Tensor:
    """Leave ``2 * LARGE_MB`` MB free in the heap, below what is returned: this is how a long-lived process looks."""
    torch.ones(30 * BYTES_PER_MB, dtype=torch.uint8)  # freed at once: glibc now serves up to 30 MB from its heap
    held = [torch.ones(BYTES_PER_MB, dtype=torch.uint8) for _ in range(2 * LARGE_MB)]
    return held[-1]


def test_a_peak_is_seen_whatever_the_heap_holds_free() -> None:
    held = heap_with_holes()
    with ResidentPeak() as block:
        before = resident_bytes()
        touch(LARGE_MB)
    assert block.peak_bytes - before > 0.9 * LARGE_MB * BYTES_PER_MB
    assert int(held[0]) == 1


@pytest.mark.skipif(memory._malloc_trim() is None, reason="needs the C library of GNU")
def test_what_the_heap_holds_free_is_given_back() -> None:
    held = heap_with_holes()
    before = resident_bytes()
    memory.give_back_free_memory()
    assert before - resident_bytes() > LARGE_MB * BYTES_PER_MB
    assert int(held.sum()) == BYTES_PER_MB


def test_where_the_c_library_cannot_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._malloc_trim.cache_clear()
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    try:
        memory.give_back_free_memory()
        assert memory._malloc_trim() is None
    finally:
        memory._malloc_trim.cache_clear()


@needs_high_water
def test_nested_blocks_do_not_take_each_others_peak() -> None:
    with ResidentPeak(method="high_water") as outer:
        base = resident_bytes()
        touch(3 * LARGE_MB)
        with ResidentPeak(method="high_water") as inner:
            touch(LARGE_MB)
    assert outer.peak_bytes - base > 2.7 * LARGE_MB * BYTES_PER_MB
    assert 0.9 * LARGE_MB * BYTES_PER_MB < inner.peak_bytes - base < 2 * LARGE_MB * BYTES_PER_MB
    assert ResidentPeak._high_water_blocks == []


@pytest.mark.parametrize("method", [pytest.param("high_water", marks=needs_high_water), "sampled"])
def test_resident_peak_ends_after_an_exception(method: str) -> None:
    with pytest.raises(KeyError), ResidentPeak(method=method) as block:
        raise KeyError
    assert block.peak_bytes > 0
    assert ResidentPeak._high_water_blocks == []
    assert not [thread for thread in threading.enumerate() if thread.name == "resident-peak"]


def test_falls_back_to_sampling(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    memory.high_water_works.cache_clear()
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    try:
        assert ResidentPeak().method == "sampled"
    finally:
        memory.high_water_works.cache_clear()


def test_status_without_the_mark_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    memory.high_water_works.cache_clear()
    (tmp_path / "status").write_text("VmRSS:  12 kB\n")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    try:
        assert not memory.high_water_works()
        assert memory._status_bytes("VmRSS") == 12 * 1024
    finally:
        memory.high_water_works.cache_clear()


def test_watch_on_a_cpu() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    reading = watch.reading()
    assert reading.peak_resident_mb is None
    assert reading.peak_allocated_mb is None
    assert reading.peak_reserved_mb is None
    assert reading.resident_mb is not None
    with watch.window(), watch.window():
        touch(LARGE_MB)
        inside = watch.reading().peak_resident_mb
    assert inside is not None
    assert inside - reading.resident_mb > 0.9 * LARGE_MB
    with watch.window():
        pass
    assert watch.reading().peak_resident_mb >= inside  # the largest window counts, not the last


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_watch_on_cuda() -> None:
    watch = MemoryWatch(torch.device("cuda"))
    before = watch.reading()
    held = torch.ones(LARGE_MB * BYTES_PER_MB, dtype=torch.uint8, device="cuda")
    del held
    after = watch.reading()
    assert after.peak_allocated_mb - before.peak_allocated_mb >= 0.9 * LARGE_MB
    assert after.peak_reserved_mb >= after.peak_allocated_mb
    assert after.resident_mb is None


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method: got 'guess', allowed: high_water, sampled"):
        ResidentPeak(method="guess")
    with pytest.raises(ValueError, match=r"interval: got 0 seconds, allowed: a positive number"):
        ResidentPeak(interval=0)
