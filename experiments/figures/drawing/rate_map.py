"""A heat map of a rate in two dimensions, with the rate and its n printed in the cells where they fit.

    rate_map = RateMap.of(critical_rate(runs, ["layer", "index_head"]), "layer", "index_head", title="harmful")
    draw_map(figure, axes, rate_map)

Cells without a fault are hatched, so that they do not look like a rate of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.figures.drawing.population import ordered
from experiments.figures.drawing.style import HEAT_COLOURS

_LARGEST_FONT, _SMALLEST_FONT = 8.0, 5.5
_POINTS = 72.0
_GLYPH = 0.62  # width of a digit relative to the size of the font


@dataclass(frozen=True, eq=False)
class RateMap:
    """A rate and its n, by row and column; both are NaN in a cell without a fault.

    Attributes:
        title: the meaning of the rate.
        rates: index and columns are the values of the two dimensions, in the order of the drawing.
        counts: n, of the same shape.
    """

    title: str
    rates: pd.DataFrame
    counts: pd.DataFrame

    @classmethod
    def of(cls, rates: pd.DataFrame, row: str, column: str, *, title: str, like: RateMap | None = None) -> RateMap:
        """Return the result of a rate function as a map; if ``like`` is given, with its rows and columns."""
        index, columns = ordered(list(rates[row])), ordered(list(rates[column]))
        if like is not None:
            index, columns = list(like.rates.index), list(like.rates.columns)
        tables = [rates.pivot(index=row, columns=column, values=name).astype(float) for name in ("rate", "n")]
        return cls(title, *(table.reindex(index=index, columns=columns) for table in tables))


def cell_size(rows: int, columns: int, width: float, height: float) -> tuple[float, float]:
    """Return width and height (inches) of a map's cells; the map is about ``width`` wide, a cell at most ``height``.

    >>> cell_size(4, 4, 4.0, 0.5), cell_size(6, 32, 8.0, 0.32)
    ((0.9, 0.5), (0.25, 0.32))
    """
    return min(0.9, max(0.1, width / columns)), min(height, max(0.1, 8.0 / rows))


def cell_font(width: float, height: float, longest: int, lines: int) -> float | None:
    """Return the font size (points) at which a text fits a cell given in inches, or None if it would be too small.

    >>> cell_font(0.6, 0.5, 4, 2), cell_font(0.2, 0.3, 4, 2)
    (8.0, None)
    """
    size = min(_LARGEST_FONT, width * _POINTS / (_GLYPH * (longest + 0.6)), height * _POINTS / (1.3 * lines))
    return size if size >= _SMALLEST_FONT else None


def draw_map(
    figure: Figure, axes: Axes, rate_map: RateMap, cell: tuple[float, float], prefix: str = "", room: float = 6.0
) -> None:
    """Draw a map with its colour bar.

    Args:
        figure: the figure that gets the colour bar.
        axes: the axes to draw on.
        rate_map: the map to draw.
        cell: width and height of a cell in inches.
        prefix: the beginning of the title.
        room: points between the map and its title.
    """
    rates = rate_map.rates.to_numpy(float)
    top = float(np.nanmax(rates, initial=0.0))
    axes.patch.set(facecolor="#F4F4F4", edgecolor="#B0B0B0", hatch="////")
    image = axes.imshow(
        np.ma.masked_invalid(rates), cmap=HEAT_COLOURS, vmin=0.0, vmax=top or 1.0, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    axes.set_title(prefix + rate_map.title, loc="left", pad=room)
    for place, names in ((axes.xaxis, rate_map.rates.columns), (axes.yaxis, rate_map.rates.index)):
        step = max(1, -(-len(names) // 40))
        place.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _print_cells(axes, rate_map, cell, top or 1.0)
    bar = figure.colorbar(
        image, ax=axes, fraction=0.14 / (cell[0] * rates.shape[1]), pad=0.01, aspect=cell[1] * len(rates) / 0.14
    )
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.08 or not top else 1))
    bar.outline.set_visible(False)


def _print_cells(axes: Axes, rate_map: RateMap, cell: tuple[float, float], top: float) -> None:
    rates, counts = rate_map.rates.to_numpy(float), rate_map.counts.to_numpy(float)
    known = np.argwhere(~np.isnan(rates))
    values = {(i, j): _percent(rates[i, j], 1) for i, j in known}
    short = {place: _percent(rates[place], 0) for place in values}
    sizes = {place: f"{int(counts[place]):,}" for place in values}
    ways = (
        {place: f"{text} %\nn={sizes[place]}" for place, text in values.items()},
        {place: f"{text}\n{sizes[place]}" for place, text in short.items()},
        short,
    )
    for texts in ways:
        lines = [line for text in texts.values() for line in text.split("\n")]
        size = cell_font(*cell, max(map(len, lines), default=1), 2 if texts is not short else 1)
        if size is not None:
            break
    else:
        return
    for (i, j), text in texts.items():
        colour = "black" if rates[i, j] > 0.5 * top else "white"
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour, linespacing=1.05)


def _percent(rate: float, decimals: int) -> str:
    """Return a rate in percent; a rate that is not 0 or 1 is never shown as 0 or 100.

    >>> _percent(0.004, 0), _percent(0.0, 1), _percent(0.9999, 1), _percent(0.25, 1)
    ('<1', '0', '>99.9', '25.0')
    """
    if rate in (0.0, 1.0):
        return f"{100 * rate:.0f}"
    smallest = 10.0**-decimals
    if 100 * rate < smallest / 2:
        return f"<{smallest:.{decimals}f}"
    if 100 * (1 - rate) < smallest / 2:
        return f">{100 - smallest:.{decimals}f}"
    return f"{100 * rate:.{decimals}f}"
