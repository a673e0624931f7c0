"""Write figures to files, whole or not at all, with the same bytes every time.

save(figure, Path("out/rates_by_bit"))        # out/rates_by_bit.svg and out/rates_by_bit.png
"""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures.drawing.style import style_context
from experiments.tables.csv_file import write_text

_DOTS_PER_INCH = 150


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG: vectors, without a date, so that equal figures are equal texts."""
    stream = io.StringIO()
    with style_context():
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def save(figure: Figure, path_without_suffix: Path | str) -> tuple[Path, Path]:
    """Write a figure as SVG and as PNG; return the two paths."""
    stem = Path(path_without_suffix)
    vector, raster = (stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png"))
    write_text(vector, svg_text(figure))
    temporary = raster.with_name(f".{raster.name}.{uuid.uuid4().hex}.tmp")
    try:
        with style_context():
            figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH)
        os.replace(temporary, raster)
    finally:
        temporary.unlink(missing_ok=True)
    return vector, raster
