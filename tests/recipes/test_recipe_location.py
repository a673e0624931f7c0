"""The recipe for a location: a row of ``LOCATION_TABLE``. A tensor that no other location has also needs its tap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from micro_campaign import table

from fault_injection.locations import LOCATION_TABLE, Location

LATE = Location(
    "late_weights",
    "the weights once more, behind every tap of them",
    tensor="weights",
    axes=LOCATION_TABLE["weights"].axes,
    computed_from=("logits",),
)


def test_a_location_of_a_known_tensor_is_a_row(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str]
) -> None:
    with LOCATION_TABLE.registered(LATE):
        assert "late_weights the weights once more, behind every tap of them" in listed("locations")
        folder = campaign("--sweep.fault.location", "weights,late_weights", "--fault.bit", "30")
        late = [run for run in table(folder / "runs.csv") if run["location"] == "late_weights"]
        assert len(late) == 2
        assert all(run["effective"] == "True" and run["outcome"] != "masked" for run in late)
        assert ">late_weights<" in page(folder)
