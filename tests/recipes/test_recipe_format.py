"""The recipe for a number format: a row of ``FORMATS``.

A model must be computed in it to have rows, and the table has every format in which torch computes one. So the test
takes a row out and brings it back in the way of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from micro_campaign import MicroPlace, table

from experiments.command_line import main
from fault_injection.numbers.formats import FORMATS, NumberFormat


def test_a_format_is_a_row(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str], micro: MicroPlace,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for attribute in ("_rows", "_names"):
        known = getattr(FORMATS, attribute)
        monkeypatch.setattr(FORMATS, attribute, {name: row for name, row in known.items() if name != "bfloat16"})
    wanted = ("--model.dtype", "bfloat16", "--fault.bit", "14")
    assert main(micro.arguments(tmp_path, *wanted)) == 2
    assert "got 'bfloat16', allowed float64, float32, float16" in capsys.readouterr().err
    with FORMATS.registered(NumberFormat("bfloat16", exponent=8, mantissa=7, computes=True)):
        assert "bfloat16       16 bits: sign 15  exponent 7..14  mantissa 0..6" in listed("formats")
        folder = campaign(*wanted)
        runs = table(folder / "runs.csv")
        assert {(run["dtype"], run["bit_field"]) for run in runs} == {("bfloat16", "exponent")}
        assert all(len(run["bits_after"]) == len("0x0000") for run in runs)
        assert ">bfloat16<" in page(folder)
