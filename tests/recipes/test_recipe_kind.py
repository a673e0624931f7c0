"""The recipe for a kind of fault: a row of ``FAULT_KINDS`` with the function of its masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from micro_campaign import table

from fault_injection.faults.kinds import FAULT_KINDS, FaultKind
from fault_injection.numbers.formats import NumberFormat


def to_infinity(layout: NumberFormat, drawn: int) -> tuple[int, int]:
    """Set every bit of the exponent and clear the mantissa; the sign stays."""
    return layout.pattern(layout.bits_of("sign")), layout.pattern(layout.bits_of("exponent"))


def test_a_kind_is_a_row(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str]
) -> None:
    row = FaultKind("infinity", "the number becomes an infinity of its sign", "nothing", to_infinity)
    with FAULT_KINDS.registered(row):
        assert "infinity        the number becomes an infinity of its sign" in listed("kinds")
        folder = campaign("--fault.kind", "infinity", "--fault.bit", "null", "--fault.location", "v")
        runs = table(folder / "runs.csv")
        assert {run["kind"] for run in runs} == {"infinity"}
        assert {run["value_after"].lstrip("-") for run in runs} == {"inf"}
        assert "infinity" in page(folder)
