"""The table of locations: what follows from it, and that a row is all it takes to inject into a place."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, logits_of

from fault_injection import (
    LOCATIONS,
    OBSERVED,
    ElementIndex,
    Fault,
    FaultSpec,
    Injector,
    SiteSurvey,
    draw_fault,
    injected,
    patched,
    tapped,
)
from fault_injection.locations import LOCATION_TABLE, Location, at

HARMFUL = ("q", "k", "v", "scores", "weights", "out", "logits", "mass")


def test_the_default_set_is_the_six_and_two_more_can_be_asked_for() -> None:
    assert LOCATIONS == ("q", "k", "v", "scores", "weights", "out")
    assert OBSERVED == (*LOCATIONS, "logits", "mass") == LOCATION_TABLE.names()


@pytest.mark.parametrize("name", ["locations", "numbers.formats", "faults.kinds", "faults.spec", "table"])
def test_the_tables_are_read_without_torch(name: str) -> None:
    # The faces of packages may load more; the modules themselves do not.
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('fault_injection'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['fault_injection'] = package\n"
        f"import fault_injection.{name}\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    folder = str((__import__("fault_injection").__path__)[0])
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0


@pytest.mark.parametrize(
    ("location", "changed"),
    [
        ("q", {"query", "scores", "logits", "weights", "mass", "out"}),
        ("k", {"key", "scores", "logits", "weights", "mass", "out"}),
        ("v", {"value", "out"}),
        ("scores", {"scores", "logits", "weights", "mass", "out"}),
        ("logits", {"logits", "weights", "mass", "out"}),
        ("weights", {"weights", "mass", "out"}),
        ("mass", {"mass", "out"}),
        ("out", {"out"}),
    ],
)
def test_what_a_fault_can_change_follows_from_what_is_computed_from_what(location: str, changed: set[str]) -> None:
    assert LOCATION_TABLE[location].changes == changed


def test_which_heads_are_shared_and_where_a_mask_hides_elements() -> None:
    assert [row.name for row in LOCATION_TABLE if row.shared] == ["k", "v"]
    assert [row.name for row in LOCATION_TABLE if row.over_pairs] == ["scores", "weights", "logits", "mass"]
    assert [row.name for row in LOCATION_TABLE if row.operand] == ["q", "k", "v"]
    assert [row.name for row in LOCATION_TABLE if row.through_softmax] == ["q", "k", "scores", "logits"]


@pytest.mark.parametrize(
    ("alias", "name"),
    [("query", "q"), ("keys", "k"), ("attention_scores", "scores"), ("probabilities", "weights"), ("context", "out")],
)
def test_other_names_are_read_and_the_name_is_kept(alias: str, name: str) -> None:
    assert FaultSpec(alias) == FaultSpec(name)
    assert FaultSpec(alias).location == name


def test_a_fault_as_it_is_written_down_has_the_name_and_no_alias() -> None:
    shape = (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"fault\.location: got 'query', allowed q, k, v, .*; did you mean 'query'\?"):
        Fault("query", 0, "attn", "zero", "float32", shape, (0, 0, 0, 0), (), ())


def test_a_name_that_is_taken_is_refused() -> None:
    row = dataclasses.replace(LOCATION_TABLE["q"], name="early_q")
    with pytest.raises(ValueError, match=r"fault\.location: the name 'query' is taken by 'q'"):
        LOCATION_TABLE.register(row)
    assert "early_q" not in LOCATION_TABLE


# --------------------------------------------------------------------------------- a tap's replacement takes effect


class Doubler:
    """Puts twice the tensor in its place, and notes what the softmax and the products behind it make of it."""

    layers = frozenset({1})
    locations = frozenset(OBSERVED)

    def __init__(self, location: str) -> None:
        self.location, self.seen = location, dict[str, Tensor]()

    def on(self, location: str, tensor: Tensor, call: Any) -> Tensor | None:
        changed = 2 * tensor if location == self.location else tensor
        self.seen[location] = changed
        return changed if location == self.location else None


@pytest.fixture(params=["gpt2", "bloom", "gpt_oss"])
def model(request: pytest.FixtureRequest, zoo_model: Any) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    model = zoo_model(request.param)
    with patched(model):
        yield model, ZOO[request.param].inputs(model)


@pytest.mark.parametrize("location", ["logits", "mass"])
def test_what_a_tap_puts_in_place_of_logits_and_mass_is_what_attention_goes_on_with(
    location: str, model: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    subject, inputs = model
    doubler = Doubler(location)
    clean = forward(subject, inputs)
    with tapped(subject, doubler):
        changed = forward(subject, inputs)
    seen = doubler.seen
    torch.testing.assert_close(seen["weights"], torch.softmax(seen["logits"], -1), rtol=1e-5, atol=1e-6)
    groups = seen["mass"].shape[1] // seen["v"].shape[1]
    torch.testing.assert_close(seen["out"], seen["mass"] @ seen["v"].repeat_interleave(groups, 1), rtol=1e-4, atol=1e-5)
    assert not torch.equal(clean, changed)


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs))


@pytest.mark.parametrize("location", HARMFUL)
def test_a_flip_of_the_sign_changes_what_the_model_returns(
    location: str, model: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    subject, inputs = model
    site = surveyed(subject, inputs).site(1, location)
    spec = FaultSpec(location, bits=(30,), index=ElementIndex(batch=0, row=3))
    faults = [draw_fault(spec, site, np.random.default_rng(seed)) for seed in range(4)]
    clean = forward(subject, inputs)
    for fault in faults:
        with injected(subject, [fault]) as injector:
            changed = forward(subject, inputs)
        assert injector.records[0].changed == 1
        assert not torch.equal(changed, clean), fault


def surveyed(model: nn.Module, inputs: dict[str, Tensor]) -> SiteSurvey:
    survey = SiteSurvey(torch.float32)
    with tapped(model, survey):
        forward(model, inputs)
    return survey


# ------------------------------------------------------------------------------------------------- a new location


LATE = Location(
    "late_weights",
    "the weights once more, behind every tap of them",
    tensor="weights",
    axes=LOCATION_TABLE["weights"].axes,
    computed_from=("logits",),
    aliases=("weights_again",),
)


def test_one_row_makes_a_location_that_faults_are_drawn_at_and_injected_into(
    model: tuple[nn.Module, dict[str, Tensor]],
) -> None:
    subject, inputs = model
    clean = forward(subject, inputs)
    with LOCATION_TABLE.registered(LATE):
        assert [row.name for row in at("weights")] == ["weights", "late_weights"]
        site = surveyed(subject, inputs).site(1, "late_weights")
        fault = draw_fault(FaultSpec("weights_again", bits=(30,)), site, np.random.default_rng(0))
        assert (fault.location, Fault.from_json(fault.to_json())) == ("late_weights", fault)
        injector = Injector([fault])
        with tapped(subject, injector):
            changed = forward(subject, inputs)
        injector.finish()
        assert [record.changed for record in injector.records] == [1]
        assert not torch.equal(changed, clean)
    assert "late_weights" not in LOCATION_TABLE
    with pytest.raises(ValueError, match=r"fault\.location: got 'late_weights', allowed q, k, v, .*, logits, mass"):
        FaultSpec("late_weights")
