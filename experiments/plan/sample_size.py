"""How many runs a rate needs: the sample size of statistical fault injection.

Source: R. Leveugle, A. Calvez, P. Maistri, P. Vanhauwaert, "Statistical fault injection: quantified error and
confidence", DATE 2009, equation 2: n = N / (1 + e^2 (N - 1) / (t^2 p (1 - p))).

>>> sample_size(0.01, 0.95), sample_size(0.05, 0.95), sample_size(0.01, 0.99)
(9604, 385, 16588)
"""

from __future__ import annotations

import math
from fractions import Fraction

from scipy.special import ndtri


def sample_size(margin: float, confidence: float, population: int | None = None, rate: float = 0.5) -> int:
    """Return the number of faults to draw, without replacement, for a margin of error.

    Args:
        margin: half width of the interval, in (0, 1).
        confidence: its confidence, in (0, 1).
        population: the number of different faults; ``None`` for the limit of infinitely many.
        rate: the expected rate; 0.5 is the worst case.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value in (("margin", margin), ("confidence", confidence), ("rate", rate)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: got {value}, allowed a number between 0 and 1")
    if population is not None and population < 1:
        raise ValueError(f"population: got {population}, allowed 1 or more")
    # Fractions: as a float, the square of a margin of 1e-200 would be 0, and the sample size would overflow.
    quantile, share = Fraction(float(-ndtri((1 - confidence) / 2))), Fraction(rate)
    unlimited = quantile**2 * share * (1 - share) / Fraction(margin) ** 2
    if population is None or not unlimited:
        return max(1, math.ceil(unlimited))
    # The equation as n = N u / (u + N - 1), with u its limit for an unlimited population.
    return min(population, max(1, math.ceil(population * unlimited / (unlimited + population - 1))))
