"""Tables that others can add to: what they say of an unknown name, and that an entry is taken back."""

from __future__ import annotations

import pytest

from experiments.config.source_names import SOURCES
from experiments.errors import UsageError
from experiments.figures.catalogue import FIGURES
from experiments.inputs.families import FAMILIES
from experiments.launchers.registry import LAUNCHERS
from experiments.registry import Registry, loaded


def test_an_unknown_name_is_refused_with_what_is_allowed_and_what_is_nearest() -> None:
    with pytest.raises(UsageError, match=r"family: got 'mask', allowed causal, masked, .*; did you mean 'masked'\?"):
        FAMILIES.find("mask")


def test_an_entry_is_there_for_the_block_also_if_it_raises() -> None:
    colours = Registry("colour", {"red": 1})

    def use() -> None:
        with colours.registered("blue", 2):
            assert dict(colours) == {"red": 1, "blue": 2}
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert dict(colours) == {"red": 1}


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match=r"data\.source: 'csv' is taken"), SOURCES.registered("csv", SOURCES["text"]):
        pass


@pytest.mark.parametrize(
    "where",
    [
        *(entry.where for entry in FIGURES.values()),
        *(f"{entry.where}_caption" for entry in FIGURES.values()),
        *(source.documents or source.windows for source in SOURCES.values()),
        *(family.inputs for family in FAMILIES.values()),
        *(family.targets for family in FAMILIES.values() if family.targets),
        *(f"{launcher.module}:{name}" for launcher in LAUNCHERS.values() for name in ("launch", "show")),
    ],
)
def test_whatever_a_table_names_can_be_loaded(where: str) -> None:
    assert callable(loaded(where))
