"""The distribution of epsilon's margin: how far it stays inside its bounds, or leaves them.

    margin_distribution(runs)

Margins span forty orders of magnitude in both signs. The axis is linear near 0 and logarithmic beyond, the bins follow
it, and its two outermost bins hold everything farther out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.analysis import distinct_faults, margin_statistics
from experiments.figures.drawing.no_data import need_columns
from experiments.figures.drawing.population import ordered, population
from experiments.figures.drawing.style import OUTCOME_STYLES, SERIES_STYLES, new_figure, percent_axis, styled

_UNKNOWN = "outcome not known"
_PER_DECADE = 3
_LARGEST = 100.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MarginBins:
    """Bins of a signed axis: linear up to ``linear``, then ``_PER_DECADE`` bins a decade up to ``largest``."""

    linear: float
    largest: float

    @classmethod
    def around(cls, values: Floats) -> MarginBins:
        """Return bins such that nine of ten finite values are in the logarithmic parts."""
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        if not len(sizes):
            return cls(1.0, 10.0)
        linear = 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.1)))
        largest = 10.0 ** np.ceil(np.log10(np.quantile(sizes, 0.9)))
        return cls(float(linear), float(min(max(largest, 10 * linear), max(_LARGEST, 10 * linear))))

    def place(self, values: Floats) -> Floats:
        """Return the positions of values on the axis: one unit per decade, and one for each side of the linear part."""
        sizes = np.abs(values) / self.linear
        return np.sign(values) * np.where(sizes <= 1, sizes, 1 + np.log10(np.maximum(sizes, 1)))

    @property
    def edges(self) -> Floats:
        """The edges of the bins on that axis; 0 is one of them."""
        half = round((1 + np.log10(self.largest / self.linear)) * _PER_DECADE)
        return np.arange(-half, half + 1) / _PER_DECADE


@styled
def margin_distribution(runs: pd.DataFrame) -> Figure:
    """Draw the histogram of the margin for each outcome.

    Raises:
        NoDataError: no run has a margin.
    """
    need_columns(runs, ("epsilon_margin",), "epsilon margin")
    faults = distinct_faults(runs)
    faults = faults.assign(outcome=faults["outcome"].astype(object).fillna(_UNKNOWN))
    bins = MarginBins.around(faults["epsilon_margin"].to_numpy(np.float64, na_value=np.nan))
    outcomes = ordered(list(faults["outcome"]))
    figure = new_figure(7.2, 0.6 + 1.3 * len(outcomes))
    grid = figure.subplots(len(outcomes), 1, squeeze=False, sharex=True)[:, 0]
    for axes, outcome in zip(grid, outcomes, strict=True):
        _draw(axes, bins, faults[faults["outcome"] == outcome], str(outcome))
    _label(grid[-1], bins)
    return figure


def margin_histogram(faults: pd.DataFrame, bins: MarginBins) -> pd.Series:
    """Return the share of faults in each bin: ``less``, the bins by number, ``more``, and ``not finite``.

    Margins that are missing count as not finite. The left edge belongs to a bin.
    """
    margins = faults["epsilon_margin"].to_numpy(np.float64, na_value=np.nan)
    finite = margins[np.isfinite(margins)]
    edges = bins.edges
    # Numbers beyond the outer edges keep their side; infinite ones must not be lost.
    numbers = np.searchsorted(edges, bins.place(finite), side="right")
    counts = np.bincount(numbers, minlength=len(edges) + 1)
    names = ["less", *map(str, range(len(edges) - 1)), "more", "not finite"]
    return pd.Series([*counts, len(margins) - len(finite)], names) / max(1, len(margins))


def _apart(edges: Floats) -> tuple[float, float, float]:
    """Return the positions of the bars outside the axis: less, more, and not finite."""
    reach = 0.06 * (edges[-1] - edges[0])
    return edges[0] - reach, edges[-1] + reach, edges[-1] + 2.4 * reach


def _draw(axes: Axes, bins: MarginBins, faults: pd.DataFrame, outcome: str) -> None:
    shares, edges = margin_histogram(faults, bins), bins.edges
    width = 1 / _PER_DECADE
    less, more, not_finite = _apart(edges)
    places = [less, *(edges[:-1] + width / 2), more, not_finite]
    style = OUTCOME_STYLES.get(outcome, SERIES_STYLES[0])
    axes.bar(
        places, shares.to_numpy(float), width=width, facecolor=style.colour, hatch=style.hatch, edgecolor="#404040",
        linewidth=0.5,
    )  # fmt: skip
    axes.axvline(0.0, color="black", linewidth=1.2)
    counts = margin_statistics(faults).iloc[0]
    title = f"{outcome}: n = {len(faults):,}"
    if counts["outside_n"] > 0:
        title += f"; outside the bounds: {int(counts['outside']):,} of {int(counts['outside_n']):,} that are known"
    axes.set_title(title, loc="left", fontsize=8, pad=2)
    axes.set_ylabel("share")
    percent_axis(axes.yaxis, float(shares.max()) or 1.0)
    axes.grid(axis="y")


def _label(axes: Axes, bins: MarginBins) -> None:
    less, more, not_finite = _apart(bins.edges)
    exponents = np.arange(round(np.log10(bins.linear)), round(np.log10(bins.largest)) + 1)
    step = max(1, -(-len(exponents) // 5))
    powers = [10.0**exponent for exponent in exponents[-2::-step]]  # the outermost would touch what stands apart
    ticks = [*(-value for value in powers), 0.0, *powers[::-1]]
    names = [f"$-10^{{{round(np.log10(-value))}}}$" if value < 0 else "0" if value == 0 else
             f"$10^{{{round(np.log10(value))}}}$" for value in ticks]  # fmt: skip
    axes.set_xticks([less, *bins.place(np.array(ticks)), more, not_finite], ["less", *names, "more", "not\nfinite"])
    axes.set_xlabel("margin of epsilon (units of q·k); negative: outside its bounds")


def margin_distribution_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return (
        "Smallest distance of epsilon (s@w) from its bounds in the first injected layer, by outcome; the axis is "
        "linear around 0 and logarithmic beyond. Right of the line rows keep their bounds. Margins that are NaN, "
        f"or were not computed, are the last bar. {population(runs)}."
    )
