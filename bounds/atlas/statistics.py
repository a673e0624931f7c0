"""Statistics of millions of predicted faults: counts, histograms of their sizes, and the worst few.

Sizes are sorted into bins of equal ratio (BINS_PER_DECADE of them to a factor of ten), so that a median costs no memory
and statistics of several bits can be joined; a quantile is exact to within one bin, 3.7 % either way. Largest values
are exact.

>>> statistics = FlipStatistics()
>>> sizes = torch.tensor([1.0, 10.0, 100.0])
>>> never = torch.zeros(3, dtype=torch.bool)
>>> statistics.add(Flips("v", 3, (0, 0), sizes, sizes, effect=sizes, relative=sizes, noise_ratio=sizes, loss=-sizes,
...                      nonfinite=never, counted=~never))
>>> statistics.flips, statistics.noise_level, round(statistics.relative_quantile(0.5), 0), statistics.largest_relative
(3, 1, 10.0, 100.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bounds.effects.flips import Flips

BINS_PER_DECADE = 32
_LOWEST, _HIGHEST = -60, 60  # decades; sizes outside are counted in the outermost bins
_BINS = (_HIGHEST - _LOWEST) * BINS_PER_DECADE


@dataclass
class FlipStatistics:
    """Counts and sizes of a set of flips.

    Attributes:
        flips, nonfinite, noise_level: how many; the latter two are subsets of ``flips`` without common members.
        largest_relative, largest_loss: over the finite ones; 0.0 where there are none.
    """

    flips: int = 0
    nonfinite: int = 0
    noise_level: int = 0
    largest_relative: float = 0.0
    largest_loss: float = 0.0
    _relative: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    _loss: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def add(self, flips: Flips) -> None:
        """Count ``flips``."""
        finite = flips.counted & ~flips.nonfinite
        relative, loss = flips.relative[finite], flips.loss[finite].abs()
        self.flips += int(flips.counted.sum())
        self.nonfinite += int((flips.counted & flips.nonfinite).sum())
        self.noise_level += int((flips.noise_ratio[finite] <= 1).sum())
        if len(relative):
            self.largest_relative = max(self.largest_relative, float(relative.max()))
            self.largest_loss = max(self.largest_loss, float(loss.max()))
            self._relative += _histogram(relative)
            self._loss += _histogram(loss)

    def join(self, other: FlipStatistics) -> None:
        """Count what ``other`` has counted."""
        self.flips += other.flips
        self.nonfinite += other.nonfinite
        self.noise_level += other.noise_level
        self.largest_relative = max(self.largest_relative, other.largest_relative)
        self.largest_loss = max(self.largest_loss, other.largest_loss)
        self._relative += other._relative
        self._loss += other._loss

    def relative_quantile(self, share: float) -> float:
        """Return this quantile of the relative effects of the finite flips; NaN where there are none."""
        return _quantile(self._relative, share)

    def loss_quantile(self, share: float) -> float:
        """Return this quantile of the predicted |loss changes| of the finite flips; NaN where there are none."""
        return _quantile(self._loss, share)


def _histogram(sizes: Tensor) -> Tensor:
    bins = ((sizes.double().log10() - _LOWEST) * BINS_PER_DECADE).floor().clamp(0, _BINS - 1)
    return torch.bincount(bins.long().cpu(), minlength=_BINS)


def _quantile(histogram: Tensor, share: float) -> float:
    total = int(histogram.sum())
    if total == 0:
        return math.nan
    rank = min(total - 1, int(share * total))
    place = int((histogram.cumsum(0) <= rank).sum())
    # The lowest bin has zeros, and numbers too small to tell from them.
    return 0.0 if place == 0 else 10.0 ** (_LOWEST + (place + 0.5) / BINS_PER_DECADE)


@dataclass(frozen=True)
class RankedFlip:
    """One predicted fault: where, what it changes, and what that is predicted to do.

    Attributes:
        layer: number of the attention core.
        location, bit: what is hit.
        index: (batch, head, row, column).
        before, after: the element's value.
        effect: Frobenius norm of the change of out.
        relative: largest change of a row in units of its length.
        loss: predicted change of the loss.
    """

    layer: int
    location: str
    bit: int
    index: tuple[int, int, int, int]
    before: float
    after: float
    effect: float
    relative: float
    loss: float


class Ranking:
    """The finite flips with the largest predicted |loss change|, ``size`` of them at most."""

    def __init__(self, size: int, layer: int) -> None:
        self._size = size
        self._layer = layer
        self._kept: list[RankedFlip] = []

    def add(self, flips: Flips) -> None:
        """Offer ``flips``."""
        if self._size == 0:
            return
        harm = torch.where(flips.counted & ~flips.nonfinite, flips.loss.abs(), -1.0).flatten()
        values, places = harm.topk(min(self._size, harm.numel()))
        floor = abs(self._kept[-1].loss) if len(self._kept) == self._size else 0.0
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if value > floor:
                self._kept.append(self._ranked(flips, *divmod(place, flips.loss.shape[-1])))
        self._kept = sorted(self._kept, key=lambda flip: -abs(flip.loss))[: self._size]

    def _ranked(self, flips: Flips, row: int, column: int) -> RankedFlip:
        numbers = (float(t[row, column]) for t in (flips.before, flips.after, flips.effect, flips.relative, flips.loss))
        return RankedFlip(self._layer, flips.location, flips.bit, (*flips.origin, row, column), *numbers)

    def worst(self) -> tuple[RankedFlip, ...]:
        """Return the worst flips, the worst first."""
        return tuple(self._kept)
