"""The floating-point format of the tensors that faults hit, and its fields on an axis of bits.

    for dtype, runs in by_tensor_dtype(runs):
        mark_fields(axes, dtype)              # bands and names: mantissa, exponent, sign

A tensor may have another dtype than the model: some architectures compute scores and weights in float32 within a
bfloat16 model. The width of the recorded bit pattern shows the dtype of the tensor that a fault hit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes

from experiments.figures.drawing.no_data import NoDataError
from fault_injection.numbers.formats import FORMATS, NumberFormat

_GROUPS = ("dtype", "location")
_OF_WIDTH = {number.bits: number.name for number in FORMATS if number.accumulates}
"""The dtype of tensors that are wider than their model: architectures widen to the formats in which kernels sum."""
_BAND_COLOURS = {"mantissa": "#FFFFFF", "exponent": "#ECECEC", "sign": "#D4D4D4"}


def by_tensor_dtype(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (dtype, runs with a fault of one bit in tensors of that dtype), the most frequent dtype first.

    Raises:
        NoDataError: no fault has exactly one bit.
    """
    single = runs[runs["bit"].notna()].reset_index(drop=True)
    if single.empty:
        raise NoDataError(f"none of the {len(runs):,} runs has a fault of exactly one bit")
    dtypes = _tensor_dtypes(single)
    for dtype in dtypes.value_counts().index:
        part = single[dtypes == dtype]
        yield str(dtype), part.assign(bit=part["bit"].astype(int))


def _tensor_dtypes(runs: pd.DataFrame) -> pd.Series:
    """Return the dtype of each run's tensor, found once per group, because a million rows have a million texts."""
    dtypes = runs["dtype"].astype(object)
    if "bits_before" not in runs.columns:
        return dtypes
    keys = [name for name in ("model", *_GROUPS) if name in runs.columns]
    found = dtypes.copy()
    for _, pattern in runs.groupby(keys, observed=True, sort=False)["bits_before"]:
        first = pattern.first_valid_index()
        if first is None:
            continue
        width = 4 * len(str(pattern[first]).removeprefix("0x"))
        model_dtype = str(dtypes[pattern.index[0]])
        if width != bits_of(model_dtype).bits and width in _OF_WIDTH:
            found.loc[pattern.index] = _OF_WIDTH[width]
    return found


def bits_of(dtype: str) -> NumberFormat:
    """Return the format of a dtype given by name."""
    return FORMATS[dtype]


def field_spans(dtype: str, bits: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (field, place of its first bit, place of its last) for ascending bits of a dtype.

    >>> field_spans("bfloat16", range(16))
    [('mantissa', 0, 6), ('exponent', 7, 14), ('sign', 15, 15)]
    >>> field_spans("float32", [3, 30, 31])
    [('mantissa', 0, 0), ('exponent', 1, 1), ('sign', 2, 2)]
    """
    fields = [bits_of(dtype).field_of(bit) for bit in bits]
    return [(name, fields.index(name), fields.index(name) + fields.count(name) - 1) for name in dict.fromkeys(fields)]


def mark_fields(axes: Axes, dtype: str, bits: Sequence[int] | None = None) -> None:
    """Mark the fields of a dtype along the x axis, and name them above the axes.

    Args:
        axes: the axes; their x axis shows bits.
        dtype: the dtype of the tensors.
        bits: the bits at the places 0, 1, ... of the axis, separated by lines; by default the axis shows all bits,
            with bands.
    """
    shown = range(bits_of(dtype).bits) if bits is None else bits
    for name, first, last in field_spans(dtype, shown):
        if bits is None:
            axes.axvspan(first - 0.5, last + 0.5, facecolor=_BAND_COLOURS[name], edgecolor="none", zorder=0)
        elif first:
            axes.axvline(first - 0.5, color="white", linewidth=1.6)
        # A field of one bit is narrower than its name, and names must not overlap.
        place, align = ((first + last) / 2, "center") if last > first else (last + 0.5, "right")
        if last == first == 0:
            place, align = -0.5, "left"
        axes.annotate(
            name, (place, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha=align, va="bottom", fontsize=8, style="italic",
        )  # fmt: skip
    axes.set_xlim(-0.5, len(shown) - 0.5)
    step = 1 if len(shown) <= 32 else 2 if len(shown) <= 48 else 4
    axes.set_xticks(range(0, len(shown), step), [str(bit) for bit in shown[::step]])
