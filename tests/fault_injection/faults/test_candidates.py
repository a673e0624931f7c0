"""Faults drawn together against faults drawn one at a time, and against the rewriting of bits."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fault_injection import ElementIndex, FaultSpec, Site, draw_fault, rewrite_bits
from fault_injection.faults.candidates import ElementPool, draw_candidates

CAUSAL = torch.ones(3, 3, dtype=torch.bool).tril()
SITES = {
    "everything": Site(0, "m", "q", (2, 2, 3, 4), 4, torch.float32),
    "causal": Site(1, "m", "scores", (2, 3, 3, 3), 3, torch.float32, CAUSAL[None, None]),
    "by sequence": Site(1, "m", "weights", (2, 3, 3, 4), 3, torch.float32, CAUSAL.expand(2, 1, 3, 3)),
    "by head": Site(1, "m", "weights", (1, 2, 3, 3), 3, torch.float32, torch.stack([CAUSAL, CAUSAL.T])[None]),
    "keys": Site(1, "m", "k", (2, 2, 3, 4), 4, torch.float32, CAUSAL[1:, None, :, None]),
    "nothing": Site(1, "m", "scores", (1, 1, 2, 2), 2, torch.float32, torch.zeros(1, 1, 2, 2, dtype=torch.bool)),
}  # fmt: skip
PARTIAL = [ElementIndex(), ElementIndex(row=1), ElementIndex(head=0, col=2), ElementIndex(batch=0, row=0, col=1)]


def allowed(site: Site, partial: ElementIndex, *, include_masked: bool) -> set[tuple[int, ...]]:
    """What may be hit, element by element."""
    agree = [
        index
        for index in itertools.product(*map(range, site.extent))
        if all(given in (None, i) for given, i in zip(partial.as_tuple(), index, strict=True))
    ]
    seen = [index for index in agree if site.sees(index)]
    return set(agree if include_masked or not seen else seen)


@pytest.mark.parametrize("include_masked", [False, True])
@pytest.mark.parametrize("partial", PARTIAL)
@pytest.mark.parametrize("name", SITES)
def test_a_pool_is_what_is_drawn_from_one_at_a_time(name: str, partial: ElementIndex, include_masked: bool) -> None:
    site = SITES[name]
    if name == "nothing" and partial.col == 2:
        with pytest.raises(IndexError, match=r"fault.index.col: got 2, allowed 0\.\.1"):
            ElementPool.of(site, partial, include_masked=include_masked)
        return
    expected = allowed(site, partial, include_masked=include_masked)
    pool = ElementPool.of(site, partial, include_masked=include_masked)
    drawn = Counter(map(tuple, pool.draw(60 * len(expected), np.random.default_rng(0)).tolist()))
    assert set(drawn) == expected
    assert len(pool) == len(expected)
    assert chisquare(list(drawn.values())).pvalue > 1e-4 or len(expected) == 1
    one = {site.draw(partial, np.random.default_rng(i), include_masked=include_masked) for i in range(20)}
    assert one <= expected


KINDS = [
    ("bitflip", None), ("bitflip", "exponent"), ("bitflip", (3, 7)), ("stuck_at_0", None), ("stuck_at_1", "mantissa"),
    ("zero", None), ("random_value", None),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_values_and_faults_are_those_of_the_rewritten_bits(kind: str, bits, dtype: torch.dtype) -> None:
    site = Site(2, "layer", "q", (2, 2, 3, 4), 4, dtype)
    tensor = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype).mT
    spec = FaultSpec("q", kind, bits)
    pool = ElementPool.of(site, spec.index, include_masked=False)
    candidates = draw_candidates(spec, site, pool, 50, np.random.default_rng(1))
    before, after = candidates.values(tensor)
    changed = 0
    for number in range(50):
        fault = candidates.fault(number)
        (element,) = fault.elements
        faulty = rewrite_bits(tensor, [element.flat], [element.keep], [element.toggle])
        assert float(before[number]) == float(tensor[fault.index])
        torch.testing.assert_close(after[number], faulty[fault.index].double(), rtol=0, atol=0, equal_nan=True)
        changed += not torch.equal(faulty, tensor)
        # The same fault, had it been drawn alone.
        alone = draw_fault(
            FaultSpec("q", kind, fault.bits or None, ElementIndex(*fault.index)), site, np.random.default_rng(2)
        )
        if kind != "random_value":
            assert fault == alone
    assert changed > 10


def test_bits_are_uniform() -> None:
    site, spec = SITES["everything"], FaultSpec("q", bits="exponent")
    pool = ElementPool.of(site, spec.index, include_masked=False)
    bits = draw_candidates(spec, site, pool, 8000, np.random.default_rng(3)).bits[:, 0]
    counts = np.bincount(bits, minlength=32)
    assert set(np.flatnonzero(counts)) == set(range(23, 31))
    assert chisquare(counts[23:31]).pvalue > 1e-4


def test_masked_positions_are_recorded() -> None:
    site, spec = SITES["nothing"], FaultSpec("scores")
    pool = ElementPool.of(site, spec.index, include_masked=False)
    assert draw_candidates(spec, site, pool, 2, np.random.default_rng(0)).fault(1).masked_position


def test_what_hits_many_elements_is_refused() -> None:
    spec, site = FaultSpec("q", "bit_error_rate", rate=0.1), SITES["everything"]
    pool = ElementPool.of(site, spec.index, include_masked=False)
    with pytest.raises(ValueError, match=r"fault.kind: got 'bit_error_rate', allowed a kind that hits one element"):
        draw_candidates(spec, site, pool, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"bit: got 40, allowed 0\.\.31"):
        draw_candidates(FaultSpec("q", bits=(40,)), site, pool, 2, np.random.default_rng(0))
