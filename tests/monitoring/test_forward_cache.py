"""The store: order, bounds, ownership of values, one computation per key, and the disk tier."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.cache.cached_value import clone_value, value_digest, value_nbytes
from monitoring.cache.disk_tier import DiskTier
from monitoring.cache.forward_cache import _MISS, MISS, CacheCorruptionError, CacheKey, Entry, Flight, ForwardCache


@dataclasses.dataclass(frozen=True)
class Baseline:
    logits: torch.Tensor
    loss: float
    layers: tuple[dict[str, torch.Tensor], ...]


Pair = namedtuple("Pair", "left right")


def baseline() -> Baseline:
    layers = ({"row_sum": torch.ones(2, 3)}, {"row_sum": torch.full((2, 3), float("nan"))})
    return Baseline(torch.arange(6.0).reshape(2, 3), 0.1 + 0.2, layers)


def key(name: str) -> CacheKey:
    return CacheKey("baseline", "base", "model", name, "params")


# -------------------------------------------------------------------------------------------- order, bounds


def test_s1_01_least_recently_used_goes_first() -> None:
    cache = ForwardCache(maxsize=2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert cache.get("b") is _MISS is MISS
    assert (cache.get("a"), cache.get("c"), len(cache), cache.evictions) == (1, 3, 2, 1)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.get("a")) == (0, 0, MISS)


@pytest.mark.parametrize("bound", [0, -1, True, 2.5])
def test_s1_01_bounds_must_be_positive_integers(bound: Any) -> None:
    with pytest.raises(ValueError, match=rf"maxsize: got {bound}, allowed are integers from 1"):
        ForwardCache(maxsize=bound)
    with pytest.raises(ValueError, match=rf"max_bytes: got {bound}, allowed are integers from 1"):
        ForwardCache(max_bytes=bound)


def test_default_byte_bound_is_a_share_of_free_memory() -> None:
    assert 1 << 20 < ForwardCache().max_bytes < 1 << 50


def test_s1_02_falsy_values_are_values() -> None:
    cache = ForwardCache()
    for name, value in {"none": None, "false": False, "zero": 0}.items():
        cache.put(name, value)
        assert cache.get(name) is value
    cache.put("empty", torch.zeros(0, 3))
    assert cache.get("empty").shape == (0, 3)


@given(
    st.lists(st.tuples(st.sampled_from("gp"), st.integers(0, 6), st.integers(1, 5)), max_size=60),
    st.integers(1, 4),
    st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_store_follows_a_plain_model(steps: list[tuple[str, int, int]], maxsize: int, max_bytes: int) -> None:
    cache = ForwardCache(maxsize, max_bytes)
    model: OrderedDict[int, int] = OrderedDict()
    for step, name, size in steps:
        if step == "g":
            expected = model.get(name)
            found = cache.get(name)
            assert (None if found is MISS else found.numel()) == expected
            if expected is not None:
                model.move_to_end(name)
        else:
            cache.put(name, torch.zeros(size, dtype=torch.uint8))
            if size <= max_bytes:
                model.pop(name, None)
                model[name] = size
                while len(model) > maxsize or sum(model.values()) > max_bytes:
                    model.popitem(last=False)
        assert (len(cache), cache.nbytes) == (len(model), sum(model.values()))


def test_a_value_larger_than_the_budget_is_not_kept() -> None:
    cache = ForwardCache(max_bytes=16)
    cache.put("small", torch.zeros(4))
    cache.put("large", torch.zeros(5))
    assert cache.get("large") is MISS
    assert (cache.uncacheable, cache.evictions, len(cache), cache.nbytes) == (1, 0, 1, 16)


# ------------------------------------------------------------------------------------------------ ownership


def test_s1_11_no_caller_can_change_a_stored_value() -> None:
    given_value = baseline()
    untouched = clone_value(given_value)
    cache = ForwardCache()
    cache.put("b", given_value)
    given_value.logits.fill_(9)
    for _ in range(2):
        lent = cache.get("b")
        assert torch.equal(lent.logits, untouched.logits)
        assert lent.layers[1]["row_sum"].isnan().all()
        lent.logits.fill_(7)
        lent.layers[0]["row_sum"].zero_()
        lent.layers[1].clear()
        object.__setattr__(lent, "loss", 5.0)
    assert value_digest(cache.get("b")) == value_digest(untouched)


def test_stored_tensors_leave_their_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    cache = ForwardCache()
    cache.put("x", [weight * 2, torch.nn.Parameter(torch.ones(1))])
    doubled, parameter = cache.get("x")
    assert not doubled.requires_grad
    assert type(parameter) is torch.Tensor


def test_a_slice_is_stored_without_the_rest_of_its_storage() -> None:
    cache = ForwardCache(max_bytes=64)
    cache.put("row", torch.zeros(1000, 4)[3])
    entry = cache.claim("row")
    assert isinstance(entry, Entry)
    assert entry.value.untyped_storage().nbytes() == 16 == cache.nbytes


def test_paranoid_cache_notices_a_changed_bit() -> None:
    cache = ForwardCache(paranoid=True)
    cache.put("b", baseline())
    assert cache.get("b").loss == 0.1 + 0.2
    entry = cache.claim("b")
    assert isinstance(entry, Entry)
    entry.value.layers[0]["row_sum"].view(torch.int32)[0, 0] ^= 1
    with pytest.raises(CacheCorruptionError, match="changed since it was stored"):
        cache.get("b")


def test_values_of_every_kind_are_copied_and_measured() -> None:
    from transformers.modeling_outputs import CausalLMOutput

    value = {
        "pair": Pair(torch.zeros(2), np.ones(3)),
        "list": [torch.zeros(1, dtype=torch.float16), {"deep": (1, "x", b"y", None, 2j)}],
        "ordered": OrderedDict(a=torch.Size([2]), b=torch.float32),
        "output": CausalLMOutput(logits=torch.zeros(2, 2)),
    }
    copy = clone_value(value)
    assert value_nbytes(value) == 8 + 24 + 2 + 16
    assert value_digest(copy) == value_digest(value)
    assert type(copy["pair"]) is Pair
    assert type(copy["output"]) is CausalLMOutput
    copy["pair"].right[0] = 5
    copy["output"].logits[0, 0] = 5
    assert value["pair"].right[0] == 1
    assert value["output"].logits[0, 0] == 0
    assert value_digest(copy) != value_digest(value)


@pytest.mark.parametrize("value", [object(), {1, 2}, bytearray(b"x"), np.array([object()]), Baseline])
def test_values_that_cannot_be_owned_are_refused_with_their_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"value\['a'\]\[1\]: cannot keep a"):
        ForwardCache().put("k", {"a": [0, value]})


@pytest.mark.parametrize("change", [{"loss": 1}, {"loss": -0.0}, {"lose": 0.0}, {"loss": None}])
def test_value_digest_sees_plain_values_and_names(change: dict[str, Any]) -> None:
    assert value_digest(change) != value_digest({"loss": 0.0})


# ------------------------------------------------------------------------------------------------- flights


def test_a_claimed_key_is_computed_by_its_owner_alone() -> None:
    cache = ForwardCache()
    flight = cache.claim("k")
    assert isinstance(flight, Flight)
    assert flight.mine
    with pytest.raises(RuntimeError, match="computing k asks for its own result"):
        cache.claim("k")
    boarded = threading.Event()
    seen: list[Any] = []

    def wait() -> None:
        claim = cache.claim("k")
        assert isinstance(claim, Flight)
        boarded.set()
        seen.extend((claim.mine, claim.wait()))

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert boarded.wait(10)
    entry = cache.admit("k", 5)
    cache.land(flight, entry)
    waiter.join()
    assert seen == [False, entry]
    assert cache.get("k") == 5


def test_a_failed_flight_leaves_the_key_free() -> None:
    cache = ForwardCache()
    first = cache.claim("k")
    assert isinstance(first, Flight)
    cache.land(first, None)
    assert first.wait() is None
    second = cache.claim("k")
    assert isinstance(second, Flight)
    assert second is not first
    cache.land(first, None)  # landing twice must not end the second flight
    with pytest.raises(RuntimeError, match="asks for its own result"):
        cache.claim("k")
    cache.land(second, cache.admit("k", 1))
    assert cache.get("k") == 1


# ------------------------------------------------------------------------------------------------ disk tier


def test_a_second_cache_reads_what_the_first_wrote(tmp_path: Path) -> None:
    first = ForwardCache(disk=DiskTier(tmp_path, types=(Baseline,)))
    first.put(key("x"), baseline())
    second = ForwardCache(disk=DiskTier(tmp_path, types=(Baseline,)))
    found = second.get(key("x"))
    assert value_digest(found) == value_digest(baseline())
    assert type(found) is Baseline
    assert (second.disk_hits, len(second)) == (1, 1)
    assert second.get(key("y")) is MISS
    second.get(key("x"))
    assert second.disk_hits == 1


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64]
)
def test_disk_tier_keeps_bits_and_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    value = {
        "t": torch.arange(6).to(dtype).reshape(2, 3).t(),
        "scalar": torch.ones((), dtype=dtype),
        "e": torch.zeros(0, 2),
    }
    disk = DiskTier(tmp_path)
    disk.store(key("x"), value)
    assert value_digest(disk.load(key("x"))) == value_digest(value)


def test_disk_tier_keeps_plain_values_exactly(tmp_path: Path) -> None:
    value = [None, True, 1, 2**70, -0.0, 0.1, float("inf"), "é", (1, [2.0]), {3: {"x": ()}}, torch.bfloat16]
    disk = DiskTier(tmp_path)
    disk.store(key("x"), value)
    assert repr(disk.load(key("x"))) == repr(value)
    disk.store(key("nan"), float("nan"))
    assert disk.load(key("nan")) != disk.load(key("nan"))


def test_equal_values_share_one_file_and_keys_do_not_mix(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    for name in ("a", "b"):
        disk.store(key(name), torch.ones(3))
    disk.store(key("c"), torch.zeros(3))
    assert len(list((tmp_path / "objects").iterdir())) == 2
    assert len(list((tmp_path / "keys").iterdir())) == 3
    assert torch.equal(disk.load(key("a")), torch.ones(3))
    assert torch.equal(disk.load(key("c")), torch.zeros(3))


@pytest.mark.parametrize("part", ["objects", "keys"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_files_are_set_aside_and_computed_again(tmp_path: Path, part: str, damage: str) -> None:
    disk = DiskTier(tmp_path)
    disk.store(key("x"), torch.ones(3))
    (path,) = (tmp_path / part).iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x80
    path.write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[damage])
    assert disk.load(key("x")) is MISS
    assert disk.corrupt == 1
    assert [other.suffix for other in (tmp_path / part).iterdir()] == [".corrupt"]
    disk.store(key("x"), torch.ones(3))
    assert torch.equal(disk.load(key("x")), torch.ones(3))


def test_an_index_of_another_key_is_not_believed(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    disk.store(key("x"), 1)
    next((tmp_path / "keys").iterdir()).rename(tmp_path / "keys" / f"{key('y').digest}.json")
    assert disk.load(key("y")) is MISS
    assert disk.corrupt == 1


def test_a_missing_object_is_a_miss(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    disk.store(key("x"), 1)
    next((tmp_path / "objects").iterdir()).unlink()
    assert disk.load(key("x")) is MISS


def test_disk_tier_refuses_unknown_classes_and_keys(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    with pytest.raises(TypeError, match=r"value\['b'\]: a Baseline cannot be written to the disk tier"):
        disk.store(key("x"), {"b": baseline()})
    assert list((tmp_path / "objects").iterdir()) == []
    with pytest.raises(TypeError, match="needs a CacheKey, got str"):
        ForwardCache(disk=disk).put("x", 1)
    DiskTier(tmp_path, types=(Pair,)).store(key("p"), Pair(1, 2))
    assert DiskTier(tmp_path, types=(Pair,)).load(key("p")) == Pair(1, 2)
    with pytest.raises(TypeError, match="needs Pair, got types"):
        disk.load(key("p"))


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskTier(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("monitoring.cache.disk_tier.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        disk.store(key("x"), 1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
