"""What every test shares: one torch thread, fixed seeds, and the zoo's models built once.

Fixtures: ``zoo_model(name, dtype)`` (a cached model: leave it as it was), ``tensors_of(model, inputs)`` (every tensor
of one patched pass), ``survey_of(model, inputs)`` (its sites); ``place`` (a micro model and text), ``whole`` (the
folder of a campaign there that was never disturbed).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from micro_campaign import MicroPlace
from torch import Tensor, nn
from zoo import ZOO

from experiments.command_line import main
from fault_injection import OBSERVED, AttentionCall, SiteSurvey, is_patched, tapped

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

TESTS = Path(__file__).parent
KERNELS = (
    "bounds", "fault_injection", "monitoring/test_cached_forward.py", "experiments/analysis", "experiments/detectors",
    "experiments/effects", "experiments/engine", "experiments/inputs", "experiments/passes", "experiments/runs",
    "experiments/test_runner.py", "experiments/test_examples.py",
)  # fmt: skip
"""Where the tests are that compare what the libraries' kernels compute: bits, thresholds, printed numbers."""

Recorded = dict[tuple[int, int, str], Tensor]


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # Tests, and the processes that they start, neither read nor write proofs of the user.
    os.environ["FAULT_INJECTION_PROOF_CACHE"] = "off"
    # Tests that run in a job of Slurm are not tasks of it. (Fixtures of modules run before those of functions.)
    for key in [key for key in os.environ if key.startswith("SLURM_") and not key.startswith("SLURM_TEST")]:
        del os.environ[key]


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        below = item.path.relative_to(TESTS) if item.path.is_relative_to(TESTS) else None
        # Outside of this folder are the examples of the modules, which print what was computed.
        if below is None or any(below.is_relative_to(place) for place in KERNELS):
            item.add_marker(pytest.mark.kernels)


@pytest.fixture(autouse=True)
def _settings_of_one_test_do_not_reach_the_next() -> Iterator[None]:
    # What a campaign sets for its process (experiments.machine.environment.set_determinism).
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _fixed_seeds_of_a_module() -> None:
    _seed()  # its fixtures come before the first of its tests


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    _seed()


@cache
def _built(name: str, dtype: torch.dtype) -> nn.Module:
    return ZOO[name].build().to(dtype)


@pytest.fixture(scope="session")
def zoo_model() -> Callable[..., nn.Module]:
    """Return ``get(name, dtype=torch.float32)``: a model shared by all tests, eager and in evaluation mode."""

    def get(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = _built(name, dtype)
        assert not is_patched(model), f"an earlier test left {name} patched"
        return model

    return get


class _Recorder:
    """A tap that copies every tensor it is shown."""

    locations = frozenset(OBSERVED)
    layers = None

    def __init__(self) -> None:
        self.tensors: Recorded = {}

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        key = call.core.index, call.number, location
        assert key not in self.tensors, f"{key} was shown twice"
        self.tensors[key] = tensor.detach().clone()


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[nn.Module, Mapping[str, Any]], Recorded]:
    """Return ``record(model, inputs)``: copies by ``(layer, call, location)`` of one pass of a patched model."""

    def record(model: nn.Module, inputs: Mapping[str, Any]) -> Recorded:
        recorder = _Recorder()
        with torch.no_grad(), tapped(model, recorder):
            model(**inputs)
        return recorder.tensors

    return record


@pytest.fixture(scope="session")
def survey_of() -> Callable[[nn.Module, Mapping[str, Any]], SiteSurvey]:
    """Return ``survey(model, inputs)``: the sites of one pass of a patched model."""

    def survey(model: nn.Module, inputs: Mapping[str, Any]) -> SiteSurvey:
        sites = SiteSurvey(next(model.parameters()).dtype)
        with torch.no_grad(), tapped(model, sites):
            model(**inputs)
        return sites

    return survey


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicroPlace]:
    with MicroPlace.entered(tmp_path_factory.mktemp("place")) as entered:
        yield entered


@pytest.fixture(scope="module")
def whole(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert main(place.arguments(output)) == 0
    return output / "micro"
