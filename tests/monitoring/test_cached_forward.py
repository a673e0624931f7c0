"""Lookups, counters and trace together: what was asked, computed, counted and written always agrees."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.cached_forward import CachedForward, labelled
from monitoring.cache.disk_tier import DiskTier
from monitoring.cache.fingerprints import view_id
from monitoring.cache.forward_cache import CacheCorruptionError, Entry, ForwardCache
from monitoring.cache.pass_recorder import PassCall, Stopwatch
from monitoring.trace.trace_writer import TraceWriter

IDS = torch.arange(8).reshape(2, 4)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


class Runner(CachedForward):
    """A ``CachedForward`` whose trace can be read back."""

    def __init__(self, path: Path, **options: Any) -> None:
        store = options.pop("store", {"maxsize": 64})
        cache = options.pop("cache") if "cache" in options else ForwardCache(**store)
        self.path = path
        super().__init__(cache, TraceWriter(path), BackendStats(), **options)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def check_conservation(self) -> None:
        """S1-05, at any moment."""
        with self.cache.lock:
            counts, lines = self.snapshot(), self.lines()
        done = [line for line in lines if line["status"] == "ok"]
        computed = [line for line in lines if line["hit"] is False]
        assert counts["cache_hits"] + counts["cache_misses"] == counts["total_lookups"] == len(done)
        assert counts["cache_misses"] == counts["forward_passes"] == len(computed)
        assert counts["cache_hits"] == sum(line["hit"] is True for line in lines)
        assert counts["errors"] == sum(line["status"] == "error" for line in lines)
        assert counts["rows"] == sum(line["rows"] for line in computed)
        assert counts["batched_prompts"] == sum(line["batch_size"] is not None for line in computed)
        assert counts["max_batch_size"] == max((line["batch_size"] or 0 for line in computed), default=0)
        assert counts["scoring_wall_s"] == pytest.approx(sum(line["wall_ms"] for line in done) / 1e3)
        assert [line["seq"] for line in lines] == list(range(counts["trace_lines"]))
        for line in lines:
            assert (line["hit"] is None) == (line["status"] == "error")


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "t.jsonl")


def refuse() -> NoReturn:
    raise AssertionError("computed again")


# ---------------------------------------------------------------------------------------------- single calls


@pytest.mark.parametrize("value", [None, False, 0, torch.zeros(0, 3)])
def test_s1_02_falsy_results_are_computed_once(runner: Runner, value: Any) -> None:
    first = runner.cached("op", "base", "prompt", 8, lambda: value)
    again = runner.cached("op", "base", "prompt", 8, refuse)
    assert first is value
    assert again.shape == (0, 3) if isinstance(value, torch.Tensor) else again is value
    assert (runner.stats.cache_hits, runner.stats.cache_misses) == (1, 1)
    runner.check_conservation()


def test_s1_03_any_change_of_the_question_misses(runner: Runner) -> None:
    model = nn.Linear(3, 2)
    base: dict[str, Any] = {
        "op": "a",
        "view": "base",
        "prompt": BATCH,
        "params": {"top_k": 8, "layers": [0]},
        "model": model,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"op": "b"},
        {"view": view_id(scaled=0.501)},
        {"view": view_id(scaled=0.504)},
        {"params": {"top_k": 9, "layers": [0]}},
        {"params": {"top_k": 8, "layers": [1]}},
        {"params": {"top_k": 8, "layers": [0], "dtype": torch.float16}},
        {"params": 8},
        {"prompt": {"input_ids": IDS[:1], "attention_mask": BATCH["attention_mask"][:1]}},
        {"prompt": {**BATCH, "attention_mask": IDS.clamp(max=1)}},
        {"prompt": {"input_ids": IDS}},
        {"prompt": IDS},
        {"composition": (8, 4)},
    ]
    for number, change in enumerate(changes):
        assert runner.cached(**{**base, **change}, compute=lambda number=number: number) == number
    assert len(runner.cache) == len(changes)
    with torch.no_grad():
        model.weight.view(torch.int32)[0, 0] ^= 1
    assert runner.cached(**base, compute=lambda: "one bit") == "one bit"
    model.half()
    assert runner.cached(**base, compute=lambda: "dtype") == "dtype"
    assert (runner.stats.cache_hits, len(runner.cache)) == (0, len(changes) + 2)
    runner.check_conservation()


def test_s1_03_a_restored_weight_hits_again(runner: Runner) -> None:
    runner.model = nn.Linear(3, 2)
    assert runner.cached("a", "base", BATCH, 8, lambda: "clean") == "clean"
    with torch.no_grad():
        runner.model.weight.view(torch.int32)[0, 0] ^= 1
    assert runner.cached("a", "base", BATCH, 8, lambda: "faulty") == "faulty"
    with torch.no_grad():
        runner.model.weight.view(torch.int32)[0, 0] ^= 1
    assert runner.cached("a", "base", BATCH, 8, refuse) == "clean"


def test_s1_11_editing_a_result_does_not_change_the_next_hit(runner: Runner) -> None:
    def compute() -> dict[str, Any]:
        return {"logits": torch.arange(4.0), "layers": [torch.full((2,), float("nan"))]}

    expected = compute()
    for _ in range(3):
        found = runner.cached("a", "base", BATCH, 8, compute)
        assert torch.equal(found["logits"], expected["logits"])
        assert torch.equal(found["layers"][0].view(torch.int32), expected["layers"][0].view(torch.int32))
        found["logits"].mul_(-1)
        found["layers"][0].zero_()
        found["layers"].append("more")
    assert runner.stats.forward_passes == 1


def test_s1_09_a_failure_reaches_the_caller_and_is_forgotten(runner: Runner) -> None:
    def fail() -> NoReturn:
        raise ZeroDivisionError("no luck")

    with pytest.raises(ZeroDivisionError, match="no luck"):
        runner.cached("a", "base", "p", 8, fail)
    assert runner.cached("a", "base", "p", 8, lambda: 1) == 1
    assert runner.cached("a", "base", "p", 8, refuse) == 1
    errors = [line for line in runner.lines() if line["status"] == "error"]
    assert [line["error"] for line in errors] == ["ZeroDivisionError: no luck"]
    assert errors[0]["hit"] is None
    assert (runner.stats.errors, runner.stats.cache_misses, runner.stats.cache_hits) == (1, 1, 1)
    runner.check_conservation()


def test_s1_09_a_result_that_cannot_be_kept_frees_its_key(runner: Runner) -> None:
    with pytest.raises(TypeError, match="cannot keep a object"):
        runner.cached("a", "base", "p", 8, object)
    assert runner.cached("a", "base", "p", 8, lambda: 1) == 1
    assert runner.stats.errors == 1


def test_s1_10_a_nonfinite_loss_is_null_and_named(runner: Runner) -> None:
    for loss in (float("nan"), float("inf")):
        prompt = f"{loss}"
        runner.cached(
            "a", "base", prompt, 8, lambda loss=loss: {"loss": loss}, details=lambda value: {"loss": value["loss"]}
        )
    for line in runner.path.read_text().splitlines():
        event = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert (event["loss"], event["nonfinite"]) == (None, ["loss"])


def test_trace_lines_say_what_was_asked(runner: Runner) -> None:
    with labelled("campaign/trial"):
        runner.cached("a", "base", BATCH, {"top_k": 3, "layers": (0,)}, lambda: 1, run_id="r", trial_id="t")
        runner.cached("a", "base", "p", 0, lambda: 1)
    tensors, text = runner.lines()
    key = runner.key("a", "base", BATCH, {"top_k": 3, "layers": (0,)})
    assert (tensors["prompt_hash"], tensors["params_fp"]) == (key.input_fp[:12], key.params_fp[:12])
    assert (tensors["op"], tensors["view_id"], tensors["top_k"], tensors["rows"]) == ("a", "base", 3, 2)
    assert (tensors["run_id"], tensors["trial_id"], tensors["probe"]) == ("r", "t", "campaign/trial")
    assert (tensors["device_ms"], tensors["batch_id"], tensors["batch_size"]) == (None, None, None)
    assert (text["top_k"], text["rows"], text["model_fp"]) == (0, 1, "none")


def test_unknown_and_reserved_fields_are_refused(runner: Runner) -> None:
    with pytest.raises(TypeError, match="got falut, allowed are run_id, trial_id, fault, phase, rows, details"):
        runner.cached("a", "base", "p", 8, refuse, falut=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="phase: got 'bound', allowed are baseline, injection, bounds, detection"):
        runner.cached("a", "base", "p", 8, refuse, phase="bound")
    with pytest.raises(ValueError, match="details: hit, wall_ms belong to every trace line"):
        runner.cached("a", "base", "p", 8, lambda: 1, details=lambda _: {"wall_ms": 1, "hit": True})
    with pytest.raises(ValueError, match="phase: got 'detect'"):
        runner.forward("a", "base", "p", lambda: 1, details=lambda _: {"phase_ms": {"detect": 1.0}})
    assert runner.stats.errors == 2
    runner.check_conservation()


def test_a_computation_that_needs_its_own_result_is_refused(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="asks for its own result"):
        runner.cached("a", "base", "p", 8, lambda: runner.cached("a", "base", "p", 8, lambda: 1))
    nested = runner.cached("a", "base", "q", 8, lambda: runner.cached("b", "base", "q", 8, lambda: 1) + 1)
    assert nested == 2
    runner.check_conservation()


# ----------------------------------------------------------------------------------------------------- batches


def test_s1_04_only_the_missing_prompts_are_computed(runner: Runner) -> None:
    runner.cached("a", "base", "p1", 8, lambda: "v1")
    asked: list[list[int]] = []

    def compute(indices: list[int]) -> list[str]:
        asked.append(indices)
        return [f"v{index + 1}" for index in indices]

    assert runner.cached_batch("a", "base", ["p1", "p2", "p3"], 8, compute) == ["v1", "v2", "v3"]
    assert asked == [[1, 2]]
    stats = runner.stats
    assert (stats.cache_hits, stats.cache_misses, stats.forward_passes) == (1, 3, 3)
    assert (stats.batches_sent, stats.batched_prompts, stats.max_batch_size, stats.avg_batch_size) == (1, 2, 2, 2.0)
    assert runner.cached_batch("a", "base", ["p3", "p1"], 8, compute) == ["v3", "v1"]
    assert (len(asked), stats.batches_sent) == (1, 1)
    runner.check_conservation()


def test_s1_04_duplicates_are_computed_once(runner: Runner) -> None:
    asked: list[list[int]] = []

    def compute(indices: list[int]) -> list[torch.Tensor]:
        asked.append(indices)
        return [torch.full((2,), float(index)) for index in indices]

    values = runner.cached_batch("a", "base", ["x", "x", "y"], 8, compute)
    assert asked == [[0, 2]]
    assert [value[0].item() for value in values] == [0.0, 0.0, 2.0]
    values[0].fill_(9)
    assert values[1][0] == 0
    stats = runner.stats
    assert (stats.cache_misses, stats.cache_hits, stats.coalesced) == (2, 1, 1)
    runner.cached_batch("a", "base", ["x", "x"], 8, compute)
    assert (stats.cache_misses, stats.cache_hits, stats.coalesced) == (2, 3, 1)
    runner.check_conservation()


def test_s1_04_a_wrong_number_of_values_stores_nothing(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="got 1 values for 2 missing prompts"):
        runner.cached_batch("a", "base", ["x", "x", "y"], 8, lambda _: [1])
    assert len(runner.cache) == 0
    assert (runner.stats.total_lookups, runner.stats.batches_sent, runner.stats.errors) == (0, 0, 1)
    assert runner.cached_batch("a", "base", ["x", "x", "y"], 8, lambda _: [1, 2]) == [1, 1, 2]
    runner.check_conservation()


def test_s1_04_an_empty_batch_counts_nothing(runner: Runner) -> None:
    assert runner.cached_batch("a", "base", [], 8, lambda _: refuse()) == []
    assert runner.stats == BackendStats()
    assert runner.lines() == []


def test_duplicates_of_values_too_large_to_keep_are_still_computed_once(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "t.jsonl", store={"max_bytes": 8})
    values = runner.cached_batch("a", "base", ["x", "x"], 8, lambda indices: [torch.ones(9) for _ in indices])
    values[0].zero_()
    assert torch.equal(values[1], torch.ones(9))
    assert (runner.cache.uncacheable, runner.stats.forward_passes, len(runner.cache)) == (1, 1, 0)
    runner.check_conservation()


def test_batches_of_tensors_and_their_rows(runner: Runner) -> None:
    runner.cached_batch("a", "base", [BATCH, {"input_ids": IDS[:1]}], 8, lambda _: [1, 2], composition=(3, 4))
    assert [line["rows"] for line in runner.lines()] == [2, 1]
    assert {line["batch_id"] for line in runner.lines()} == {0}
    assert [line["batch_size"] for line in runner.lines()] == [2, 2]
    assert runner.stats.rows == 3
    runner.cached_batch("a", "base", [BATCH], 8, lambda _: [3])
    assert runner.stats.forward_passes == 3
    runner.check_conservation()


def test_a_batch_takes_over_what_another_thread_failed_at(runner: Runner) -> None:
    begun, proceed = threading.Event(), threading.Event()

    def fail() -> NoReturn:
        begun.set()
        assert proceed.wait(10)
        raise ZeroDivisionError

    def first() -> None:
        with pytest.raises(ZeroDivisionError):
            runner.cached("a", "base", "x", 8, fail)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    asked: list[list[int]] = []

    def compute(indices: list[int]) -> list[int]:
        asked.append(indices)
        proceed.set()
        return indices

    assert runner.cached_batch("a", "base", ["x", "y"], 8, compute) == [0, 1]
    thread.join()
    assert asked == [[1], [0]]
    assert runner.stats.errors == 1
    runner.check_conservation()


# ------------------------------------------------------------------------------------------- faulty passes


def test_s1_05_faulty_passes_count_as_misses(runner: Runner) -> None:
    fault = {"location": "scores", "bit": 30}
    runner.cached("baseline", "base", BATCH, {}, lambda: 1.0)
    for trial in range(3):
        value = runner.forward("faulty", view_id(fault=fault), BATCH, lambda: 2.0, fault=fault, run_id=f"r{trial}")
        assert value == 2.0
    with pytest.raises(ZeroDivisionError):
        runner.forward("faulty", "base", BATCH, lambda: 1 / 0, fault=fault)
    runner.cached("baseline", "base", BATCH, {}, refuse)
    stats = runner.stats
    assert (stats.cache_hits, stats.cache_misses, stats.uncached, stats.errors) == (1, 4, 3, 1)
    assert stats.rows == 8
    assert len(runner.cache) == 1
    faulty = [line for line in runner.lines() if line["fault"]]
    assert [line["run_id"] for line in faulty] == ["r0", "r1", "r2", None]
    runner.check_conservation()


def test_published_keys() -> None:
    stats = BackendStats()
    names = "cache_hits cache_misses hit_rate forward_passes scoring_wall_s batches_sent batched_prompts"
    assert list(stats.to_dict()) == [*names.split(), "avg_batch_size", "max_batch_size"]
    assert set(stats.to_dict().values()) == {0}
    assert (stats.hit_rate, stats.avg_batch_size, stats.total_lookups) == (0.0, 0.0, 0)


# ------------------------------------------------------------------------------------------------- threads


def run_threads(count: int, work: Any) -> list[BaseException]:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_s1_06_each_key_is_computed_exactly_once(runner: Runner) -> None:
    computed: Counter[str] = Counter()

    def value_of(prompt: str) -> str:
        computed[prompt] += 1
        threading.Event().wait(0.001)
        return prompt.upper()

    def work(number: int) -> None:
        draw = random.Random(number)
        for _ in range(1000):
            prompt = f"prompt {draw.randrange(50)}"
            assert runner.cached("a", "base", prompt, 8, lambda prompt=prompt: value_of(prompt)) == prompt.upper()

    assert run_threads(16, work) == []
    assert set(computed.values()) == {1}
    assert len(computed) == 50
    stats = runner.stats
    assert (stats.cache_hits, stats.cache_misses, stats.errors) == (15950, 50, 0)
    assert stats.coalesced > 0
    runner.check_conservation()


def test_s1_06_batches_singles_failures_and_evictions_keep_the_counts(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "t.jsonl", store={"maxsize": 5})
    watching = threading.Event()

    def compute(prompt: str, draw: random.Random) -> str:
        if draw.random() < 0.1:
            raise ZeroDivisionError
        return prompt.upper()

    def work(number: int) -> None:
        draw = random.Random(number)
        for step in range(60):
            prompts = [f"p{draw.randrange(12)}" for _ in range(draw.randrange(5))]
            try:
                if step % 2:
                    found = runner.cached_batch(
                        "a", "base", prompts, 8, lambda i, p=prompts: [compute(p[n], draw) for n in i]
                    )
                else:
                    found = [runner.cached("a", "base", p, 8, lambda p=p: compute(p, draw)) for p in prompts]
                assert found == [prompt.upper() for prompt in prompts]
            except ZeroDivisionError:
                continue

    def watch() -> None:
        while not watching.wait(0.02):
            runner.check_conservation()

    watcher = threading.Thread(target=watch)
    watcher.start()
    failures = run_threads(8, work)
    watching.set()
    watcher.join()
    assert failures == []
    assert runner.stats.errors > 0
    assert runner.cache.evictions > 0
    runner.check_conservation()


def test_a_waiter_takes_over_when_the_owner_fails(runner: Runner) -> None:
    begun, proceed = threading.Event(), threading.Event()

    def fail() -> NoReturn:
        begun.set()
        assert proceed.wait(10)
        raise ZeroDivisionError

    found: list[int] = []

    def owner() -> None:
        with pytest.raises(ZeroDivisionError):
            runner.cached("a", "base", "x", 8, fail)

    threads = [threading.Thread(target=owner)]
    threads[0].start()
    assert begun.wait(10)
    for _ in range(3):
        threads.append(threading.Thread(target=lambda: found.append(runner.cached("a", "base", "x", 8, lambda: 7))))
        threads[-1].start()
    proceed.set()
    for thread in threads:
        thread.join()
    assert found == [7, 7, 7]
    assert (runner.stats.errors, runner.stats.forward_passes, runner.stats.cache_hits) == (1, 1, 2)
    runner.check_conservation()


@pytest.mark.parametrize("batched", [False, True])
def test_no_hit_is_on_record_before_its_miss(runner: Runner, monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    hitters: list[threading.Thread] = []
    land = runner.cache.land

    def land_and_hit(*arguments: Any) -> None:
        land(*arguments)
        hitters.append(threading.Thread(target=lambda: runner.cached("a", "base", "p", 8, refuse)))
        hitters[-1].start()
        hitters[-1].join(0.1)

    monkeypatch.setattr(runner.cache, "land", land_and_hit)
    if batched:
        runner.cached_batch("a", "base", ["p"], 8, lambda _: [1])
    else:
        runner.cached("a", "base", "p", 8, lambda: 1)
    for hitter in hitters:
        hitter.join()
    assert [line["hit"] for line in runner.lines()] == [False, True]


def test_hits_keep_an_entry_from_being_dropped(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "t.jsonl", store={"maxsize": 2})
    for prompt in ("a", "b", "a", "c"):
        runner.cached("op", "base", prompt, 8, lambda prompt=prompt: prompt)
    runner.cached("op", "base", "a", 8, refuse)
    assert runner.stats.forward_passes == 3


def test_the_time_of_a_batch_is_shared_among_its_misses(runner: Runner) -> None:
    watch = Stopwatch()
    watch.wall_s, watch.device_ms = 6.0, 3.0
    key = runner.key("a", "base", "p", 8)
    runner.recorder.miss(PassCall.build(key, 1, 8, 0, {}), {}, watch, share=3)
    assert runner.stats.scoring_wall_s == 2.0
    (line,) = runner.lines()
    assert (line["wall_ms"], line["device_ms"], line["batch_size"]) == (2000.0, 1.0, 3)


# ------------------------------------------------------------------------------------- tiers, bounds, timing


def test_a_second_process_reuses_the_baseline_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    for number in range(2):
        cache = ForwardCache(disk=DiskTier(tmp_path / "disk"))
        runner = Runner(tmp_path / f"{number}.jsonl", cache=cache, model=model)
        compute = refuse if number else lambda: {"logits": torch.arange(3.0)}
        compute_misses = (lambda _: refuse()) if number else (lambda indices: [5 for _ in indices])
        single = runner.cached("a", "base", BATCH, 8, compute)
        batch = runner.cached_batch("a", "base", [BATCH, "p"], 8, compute_misses)
        assert torch.equal(single["logits"], torch.arange(3.0))
        assert (torch.equal(batch[0]["logits"], torch.arange(3.0)), batch[1]) == (True, 5)
        assert (runner.stats.forward_passes, cache.disk_hits) == ((2, 0) if not number else (0, 2))
        runner.check_conservation()


def test_an_unreadable_disk_tier_frees_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tmp_path / "t.jsonl", cache=ForwardCache(disk=DiskTier(tmp_path / "disk")))

    def broken(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "load", broken)
        with pytest.raises(PermissionError):
            runner.cached("a", "base", "p", 8, refuse)
    assert runner.cached("a", "base", "p", 8, lambda: 1) == 1


def test_a_value_too_large_to_keep_is_returned_and_computed_again(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "t.jsonl", store={"max_bytes": 8})
    for _ in range(2):
        assert runner.cached("a", "base", "p", 8, lambda: torch.ones(9)).sum() == 9
    assert (runner.cache.uncacheable, runner.stats.forward_passes) == (2, 2)
    runner.check_conservation()


def test_a_paranoid_cache_stops_at_a_changed_baseline(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "t.jsonl", store={"paranoid": True})
    runner.cached("a", "base", "p", 8, lambda: torch.ones(2))
    entry = runner.cache.claim(runner.key("a", "base", "p", 8))
    assert isinstance(entry, Entry)
    entry.value[0] = 2
    with pytest.raises(CacheCorruptionError, match="changed since it was stored"):
        runner.cached("a", "base", "p", 8, refuse)


def test_timing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            order.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronise"))
    watch = Stopwatch(torch.device("cuda"))
    with watch.running():
        order.append("work")
    assert order == ["synchronise", "record", "work", "record", "synchronise"]
    assert watch.device_ms == 2.5
    with pytest.raises(KeyError), watch.running():
        raise KeyError


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_time_on_a_gpu(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "t.jsonl", model=nn.Linear(512, 512).cuda())
    x = torch.ones(512, 512, device="cuda")
    first = runner.cached("a", "base", x, 8, lambda: x @ x)
    assert torch.equal(first, runner.cached("a", "base", x, 8, refuse))
    miss, hit = runner.lines()
    assert 0 < miss["device_ms"] <= miss["wall_ms"]
    assert hit["device_ms"] is None
