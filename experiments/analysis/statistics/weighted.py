"""Estimates from non-uniform draws: a value that was drawn too rarely weighs more.

    estimate, variance = hajek(values, runs["sampling_weight"])

Draws are independent and with replacement, with probabilities q instead of the population's p. The weight of a draw is
p / q, so its expectation is 1. All estimators estimate the population's mean; docs/sampling.md says which one to use.

Sources: M. H. Hansen, W. N. Hurwitz, Annals of Mathematical Statistics 14:333, 1943 (draws with replacement); D. G.
Horvitz, D. J. Thompson, JASA 47:663, 1952; J. Hajek, comment in Foundations of Statistical Inference, 1971; variances:
C.-E. Sarndal, B. Swensson, J. Wretman, "Model Assisted Survey Sampling", 1992, 2.9 and 5.6-5.7; regression: W. G.
Cochran, "Sampling Techniques", 3rd ed. 1977, 7.1-7.3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.errors import UsageError


def horvitz_thompson(values: ArrayLike, weights: ArrayLike) -> tuple[float, float]:
    """Return the mean of weight times value, and its variance. Unbiased.

    Args:
        values: one number for each draw.
        weights: p / q of each draw; their expectation is 1.

    Raises:
        UsageError: the lengths differ, there is no draw, or a weight is negative or not finite.

    >>> horvitz_thompson([0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    (0.5, 0.08333333333333333)
    """
    value, weight = _checked(values, weights)
    terms = value * weight
    return float(terms.mean()), _variance_of_mean(terms)


def hajek(values: ArrayLike, weights: ArrayLike) -> tuple[float, float]:
    """Return the sum of weight times value over the sum of weights, and its linearised variance.

    It is almost unbiased, and varies less than ``horvitz_thompson`` if values do not grow with their probability: it
    estimates a constant without error. Arguments and errors as there.

    >>> hajek([3.0, 3.0, 3.0], [0.5, 1.0, 4.0])
    (3.0, 0.0)
    """
    value, weight = _checked(values, weights)
    if not weight.any():
        raise UsageError("sampling_weight: all are 0, allowed at least one positive")
    estimate = float((value * weight).sum() / weight.sum())
    return estimate, _variance_of_mean((value - estimate) * weight / weight.mean())


def regression(values: ArrayLike, weights: ArrayLike) -> tuple[float, float]:
    """Return the mean of weight times value, corrected by how far the mean weight is from 1, and its variance.

    For many draws it has the smallest variance of the three. It is right only for all draws together, because the
    expected weight of a part of them need not be 1. Arguments and errors as for ``horvitz_thompson``.

    >>> regression([1.0, 1.0, 1.0], [0.5, 0.75, 2.5])
    (1.0, 0.0)
    """
    parts = regression_parts(*_checked(values, weights))
    return float(parts.mean()), _variance_of_mean(parts)


def regression_parts(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the contribution of each draw, ``w h - b (w - 1)``; the regression estimate is their mean.

    ``b`` is the slope of ``w h`` over ``w``; without two different weights it is 0.

    >>> regression_parts(np.array([1.0, 1.0, 0.0]), np.array([0.5, 0.5, 2.0])).round(9).tolist()
    [0.333333333, 0.333333333, 0.333333333]
    """
    terms = weights * values
    if len(weights) < 2 or float(weights.var()) == 0:
        return terms
    slope = float(np.cov(terms, weights)[0, 1] / weights.var(ddof=1))
    return terms - slope * (weights - 1)


def _variance_of_mean(terms: NDArray[np.float64]) -> float:
    return float(terms.var(ddof=1)) / len(terms) if len(terms) > 1 else math.nan


def _checked(values: ArrayLike, weights: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    value, weight = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if value.shape != weight.shape or value.ndim != 1 or not len(value):
        raise UsageError(f"values and weights: got shapes {value.shape} and {weight.shape}, allowed (n,) twice, n > 0")
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if wrong.any():
        raise UsageError(f"sampling_weight: got {weight[wrong][0]}, allowed numbers from 0 on")
    return value, weight
