"""The recipe for a figure: a file with the drawing and its caption, and a row of ``FIGURES``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.figures.catalogue import FIGURES, FigureEntry

MODULE = '''
"""How many runs each layer was hit in."""

from experiments.figures.drawing.style import new_figure, styled


@styled
def runs_by_layer(runs):
    figure = new_figure(4, 2)
    counts = runs["layer"].value_counts().sort_index()
    figure.subplots().bar(list(map(str, counts.index)), counts.to_numpy())
    return figure


def runs_by_layer_caption(runs):
    return f"Runs by layer, n = {len(runs)}."
'''


def test_a_figure_is_a_file_and_a_row(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str],
    toy: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from experiments.figures.__main__ import main as draw

    toy("toy_figure", MODULE)
    folder = campaign()
    with FIGURES.registered("runs_by_layer", FigureEntry("Runs by layer", "toy_figure:runs_by_layer")):
        assert "runs_by_layer            Runs by layer  [runs]" in listed("figures")
        text = page(folder)
        assert "Runs by layer, n = 4." in text
        assert draw([str(folder), "--out", str(tmp_path / "figures")]) == 0
    assert "runs_by_layer.svg, runs_by_layer.png" in capsys.readouterr().out
    assert "Runs by layer, n = 4." in (tmp_path / "figures/figures.md").read_text()
