from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.plan.sample_size import sample_size

OPEN = st.floats(0.001, 0.999)


@pytest.mark.parametrize(
    ("margin", "confidence", "population", "expected"),
    [
        # The infinite limits of the usual tables, and values of equation 2 worked out by hand.
        (0.05, 0.95, None, 385), (0.01, 0.95, None, 9604), (0.03, 0.95, None, 1068), (0.1, 0.95, None, 97),
        (0.01, 0.99, None, 16588), (0.05, 0.99, None, 664), (0.05, 0.90, None, 271),
        (0.05, 0.95, 1000, 278), (0.05, 0.95, 1, 1), (0.01, 0.95, 100, 99), (0.05, 0.95, 10**12, 385),
    ],
)  # fmt: skip
def test_known_sizes(margin: float, confidence: float, population: int | None, expected: int) -> None:
    assert sample_size(margin, confidence, population) == expected


@given(margin=OPEN, confidence=OPEN, population=st.integers(1, 10**15), rate=OPEN)
def test_a_sample_is_at_least_one_and_never_larger_than_the_population(
    margin: float, confidence: float, population: int, rate: float
) -> None:
    needed = sample_size(margin, confidence, population, rate)
    assert 1 <= needed <= population
    assert needed <= max(1, sample_size(margin, confidence, None, rate))


@given(confidence=st.floats(1e-9, 1, exclude_max=True), population=st.integers(1, 100))
def test_every_confidence_has_a_size(confidence: float, population: int) -> None:
    assert 1 <= sample_size(0.05, confidence, population) <= population


@given(margin=st.floats(0.01, 0.4), confidence=st.floats(0.5, 0.99), population=st.integers(2, 10**9))
def test_a_smaller_margin_and_a_larger_population_never_need_less(
    margin: float, confidence: float, population: int
) -> None:
    needed = sample_size(margin, confidence, population)
    assert sample_size(margin / 2, confidence, population) >= needed
    assert sample_size(margin, confidence, 2 * population) >= needed
    assert sample_size(margin, min(0.999, confidence + 0.005), population) >= needed


@given(rate=OPEN)
def test_one_half_is_the_worst_rate(rate: float) -> None:
    assert sample_size(0.02, 0.95, 10_000, rate) <= sample_size(0.02, 0.95, 10_000)


@given(margin=st.floats(0.02, 0.2), population=st.integers(10, 10**7))
def test_the_sample_reaches_the_margin_and_one_less_does_not(margin: float, population: int) -> None:
    """An independent reading of equation 2: the margin that a sample of n without replacement has."""
    needed = sample_size(margin, 0.95, population)

    def margin_of(n: int) -> float:
        return 1.96 * math.sqrt(0.25 / n * (population - n) / (population - 1))

    assert margin_of(needed) <= margin * (1 + 1e-4)
    if needed > 1:
        assert margin_of(needed - 1) >= margin * (1 - 1e-4)


@pytest.mark.parametrize("name", ["margin", "confidence", "rate"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    arguments = {"margin": 0.01, "confidence": 0.95, "rate": 0.5, name: value}
    with pytest.raises(ValueError, match=rf"{name}: got {value}, allowed a number between 0 and 1"):
        sample_size(population=None, **arguments)


@pytest.mark.parametrize("population", [0, -5])
def test_an_empty_population_is_refused(population: int) -> None:
    with pytest.raises(ValueError, match=rf"population: got {population}, allowed 1 or more"):
        sample_size(0.01, 0.95, population)


@pytest.mark.parametrize("margin", [1e-160, 1e-200, 1e-300])
def test_a_margin_that_no_sample_reaches_needs_all(margin: float) -> None:
    assert sample_size(margin, 0.95, 1000) == 1000
    assert sample_size(margin, 0.95) > 1 / margin
