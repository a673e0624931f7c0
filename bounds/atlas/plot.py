"""The picture of an atlas: predicted change of the loss by location and bit, and score by score for the worst bit.

    Path("atlas.png").write_bytes(atlas_figure(calls, atlases))

Needs matplotlib, which nothing else here needs; it is loaded when a figure is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

import torch

from bounds.atlas.layers import LayerAtlas, score_map
from bounds.atlas.states import ObservedCall
from bounds.atlas.statistics import FlipStatistics

_FLOOR, _CEILING = -8.0, 2.0  # decades of |loss change| between which colours differ


def require_matplotlib() -> None:
    """Raise ValueError when matplotlib is not installed: a request for a picture is refused before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--output: atlas.png needs matplotlib, which is not installed (pip install matplotlib)")


def atlas_figure(calls: Sequence[ObservedCall], atlases: Sequence[LayerAtlas]) -> bytes:
    """Return a PNG: on the left all layers joined, on the right the scores of the layer and bit that harm most.

    Colours are the 90 % quantile of the predicted |loss change| on the left, its value on the right, as decades; "x"
    marks bits whose flips mostly give NaN or Inf.
    """
    require_matplotlib()
    # Figure and canvas by name, without pyplot: no display and no global state.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(14, 5.5), layout="constrained")
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    _draw_bits(figure, left, _joined(atlases))
    _draw_scores(figure, right, calls, atlases)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _joined(atlases: Sequence[LayerAtlas]) -> dict[tuple[str, int], FlipStatistics]:
    joined: dict[tuple[str, int], FlipStatistics] = {}
    for atlas in atlases:
        for key, entry in atlas.statistics.items():
            joined.setdefault(key, FlipStatistics()).join(entry)
    return joined


def _decade(size: float) -> float:
    return math.nan if math.isnan(size) else max(_FLOOR, min(_CEILING, math.log10(max(size, 1e-300))))


def _draw_bits(figure: Any, axes: Any, statistics: dict[tuple[str, int], FlipStatistics]) -> None:
    locations = list(dict.fromkeys(location for location, _ in statistics))
    bits = 1 + max(bit for _, bit in statistics)
    grid = [[math.nan] * bits for _ in locations]
    for (location, bit), entry in statistics.items():
        grid[locations.index(location)][bit] = _decade(entry.loss_quantile(0.9))
        if 2 * entry.nonfinite > entry.flips:
            axes.text(bit, locations.index(location), "x", ha="center", va="center", color="white")
    image = axes.imshow(grid, aspect="auto", vmin=_FLOOR, vmax=_CEILING, cmap="magma")
    axes.set_yticks(range(len(locations)), locations)
    axes.set_xticks([bit for bit in range(bits) if bit % 4 == 0 or bit == bits - 1])
    axes.set_xlabel("bit (0: least significant of the mantissa)")
    axes.set_title("predicted |loss change| of a flip, 90 % quantile, all layers")
    _colour_bar(figure, axes, image)


def _draw_scores(figure: Any, axes: Any, calls: Sequence[ObservedCall], atlases: Sequence[LayerAtlas]) -> None:
    worst = _worst_score_bit(atlases)
    if worst is None:
        axes.set_axis_off()
        axes.set_title("no score has a predicted effect")
        return
    place, bit = worst
    harm = score_map(calls[place], bit)
    decades = torch.where(harm.isnan(), torch.nan, harm.clamp(min=1e-300).log10().clamp(_FLOOR, _CEILING))
    axes.set_facecolor("lightgrey")
    image = axes.imshow(decades.tolist(), vmin=_FLOOR, vmax=_CEILING, cmap="magma", interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"scores of layer {atlases[place].layer}, bit {bit}: largest of all heads")
    _colour_bar(figure, axes, image)


def _worst_score_bit(atlases: Sequence[LayerAtlas]) -> tuple[int, int] | None:
    """Return the place of the layer and the bit whose score flips have the largest 90 % quantile of |loss change|."""
    found = [
        (entry.loss_quantile(0.9), place, bit)
        for place, atlas in enumerate(atlases)
        for (location, bit), entry in atlas.statistics.items()
        if location == "scores" and entry.flips > entry.nonfinite
    ]
    return max(found)[1:] if found else None


def _colour_bar(figure: Any, axes: Any, image: Any) -> None:
    ticks = range(int(_FLOOR), int(_CEILING) + 1, 2)
    bar = figure.colorbar(image, ax=axes, ticks=list(ticks))
    labels = [f"$10^{{{tick}}}$" for tick in ticks]
    bar.ax.set_yticklabels([f"≤ {labels[0]}", *labels[1:-1], f"≥ {labels[-1]}"])
