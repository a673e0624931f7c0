"""When a cell has enough runs: a confidence sequence for its rate, checked after fixed numbers of repeats.

>>> rule = StopRule(margin=0.02, confidence=0.95, minimum=64, growth=1.5)
>>> rule.looks(1000)
(64, 96, 144, 216, 324, 486, 729, 1000)
>>> found = rule.interval(3, 96)
>>> round(found.low, 3), round(found.high, 3)
(0.002, 0.128)

An ordinary 95 % interval is valid at one n chosen beforehand. If you check it again and again, and stop when it is
narrow, it excludes the true rate more often. A *confidence sequence* is valid at all n at once, so you may stop at any
time. With a Beta(1/2, 1/2) mixture over the alternatives, s successes in n runs give the likelihood ratio

    M_n(p) = B(1/2 + s, 1/2 + n - s) / B(1/2, 1/2) / (p^s (1 - p)^(n - s)),

which for the true p is a non-negative martingale that starts at 1. The probability that it ever reaches 1 / alpha is at
most alpha (Ville), so {p: M_n(p) < 1 / alpha} covers p for all n with probability 1 - alpha.

Sources: H. Robbins, Ann. Math. Stat. 41, 1970; T. L. Lai, Ann. Stat. 4, 1976; S. R. Howard, A. Ramdas, J. McAuliffe,
J. Sekhon, Ann. Stat. 49, 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

METHOD = "beta-binomial confidence sequence"
SHAPE = 0.5
"""Both parameters of the mixture: Jeffreys'."""


class Interval(NamedTuple):
    """The limits of a rate."""

    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def confidence_sequence(successes: int, trials: int, confidence: float) -> Interval:
    """Return the limits after ``trials`` runs; they are valid at all numbers of runs at once.

    Raises:
        ValueError: a number is out of range.

    >>> [round(limit, 4) for limit in confidence_sequence(0, 100, 0.95)]
    [0.0, 0.057]
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes: got {successes}, allowed 0..{trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, allowed a number between 0 and 1")
    if trials == 0:
        return Interval(0.0, 1.0)
    failures = trials - successes
    return Interval(_lower(successes, failures, confidence), 1 - _lower(failures, successes, confidence))


def _lower(successes: int, failures: int, confidence: float) -> float:
    if successes == 0:
        return 0.0
    # Imported here: most campaigns have no stopping rule.
    from scipy.optimize import brentq
    from scipy.special import betaln, xlog1py, xlogy

    mixture = betaln(SHAPE + successes, SHAPE + failures) - betaln(SHAPE, SHAPE)
    most = -math.log1p(-confidence)

    def excess(p: float) -> float:
        """Return log M_n(p) - log(1 / alpha), which falls up to the observed rate."""
        return float(mixture - xlogy(successes, p) - xlog1py(failures, -p) - most)

    return float(brentq(excess, math.ulp(0.0), successes / (successes + failures), xtol=1e-15))


@dataclass(frozen=True)
class StopRule:
    """The rule that ends a cell of the grid.

    Attributes:
        margin: the cell ends when half the width of its interval is at most this.
        confidence: the confidence of all its intervals together.
        minimum: the number of runs at the first look.
        growth: the factor from one look to the next.
    """

    margin: float
    confidence: float = 0.95
    minimum: int = 64
    growth: float = 1.5

    def looks(self, repeats: int) -> tuple[int, ...]:
        """Return the numbers of runs at which a cell is checked; the last is all its ``repeats``.

        >>> StopRule(0.1).looks(200)
        (64, 96, 144, 200)
        """
        found, size = [], self.minimum
        while size < repeats:
            found.append(size)
            size = max(size + 1, math.ceil(size * self.growth))
        return (*found, repeats)

    def interval(self, successes: int, trials: int) -> Interval:
        """Return the limits of the rate."""
        return confidence_sequence(successes, trials, self.confidence)
