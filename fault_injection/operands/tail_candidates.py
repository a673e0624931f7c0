"""Guess what lies between a projection and the operand, and believe what explains the observations.

tail = explained_tail(module, observations, norms)       # None if no guess explains them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fault_injection.operands.norms import Norm, recognised_norm
from fault_injection.operands.operand_tails import RotaryLayout, Rotation, Tail


@dataclass(frozen=True, eq=False)
class Observation:
    """One operand as it was read, and as it was made.

    Attributes:
        operand, projected: (B, H, T, d).
        hidden: (B, T, D), what the projection read.
        rotation: cosines and sines that the module was given.
    """

    operand: Tensor
    projected: Tensor
    hidden: Tensor
    rotation: Rotation | None


class NormReader:
    """Keeps what the innermost modules of a model were given and returned, to find the norms among them."""

    def __init__(self) -> None:
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Read one pass."""
        leaves = [module for module in model.modules() if not any(module.children())]
        handles = [leaf.register_forward_hook(self._hook, with_kwargs=True) for leaf in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and isinstance(output, Tensor) and given.shape == output.shape and given.dim() > 1:
            self._calls.append((module, given.detach().clone(), output.detach().clone()))

    def before(self, hidden: Tensor) -> Norm | None:
        """Return the norm that put out exactly ``hidden``, (..., width)."""
        for module, given, output in self._calls:
            if output.shape[-1] == hidden.shape[-1] and torch.equal(_flat(output), _flat(hidden)):
                norm = recognised_norm(module, given, output)
                if norm is not None:
                    return norm
        return None

    def after(self, projected: Tensor) -> list[Norm]:
        """Return the norms that were given exactly ``projected``, (B, H, T, d), head by head or whole.

        Norms that subtract a mean are left out: what they round away is not relative to their result.
        """
        layouts = [projected.reshape(-1), projected.transpose(1, 2).reshape(-1)]
        norms = [
            recognised_norm(module, given, output)
            for module, given, output in self._calls
            if given.numel() == projected.numel() and any(torch.equal(given.reshape(-1), flat) for flat in layouts)
        ]
        return [norm for norm in norms if norm is not None and not norm.centred]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def explained_tail(core: nn.Module, observations: Sequence[Observation], norms: NormReader) -> Tail | None:
    """Return the simplest tail that explains all observations within its tolerance, else ``None``.

    Args:
        core: the attention module; its numbers are guesses for a factor.
        observations: the first one is of the pass that ``norms`` has read.
        norms: from that pass.
    """
    first = observations[0]
    channels = first.operand.shape[-1]
    layouts = [] if first.rotation is None else _layouts(channels, first.rotation[0].shape[-1])
    guesses = product([None, *layouts], [None, *norms.after(first.projected)], [1.0, *_factors(core, channels)])
    for layout, norm, factor in guesses:
        tail = Tail(norm, factor, layout)
        if all(_explains(tail, observation) for observation in observations):
            return tail
    return None


def _explains(tail: Tail, observation: Observation) -> bool:
    expected = tail.expected(observation.projected, observation.rotation, observation.operand.dtype)
    explained = (observation.operand.double() - expected.value).abs() <= expected.tolerance
    # A row of padding may be NaN in the model's own pass; random data have none.
    return bool((explained | (expected.value.isnan() & observation.operand.isnan())).all())


def _factors(core: nn.Module, channels: int) -> list[float]:
    stated = [value for value in vars(core).values() if isinstance(value, float) and value not in (0.0, 1.0)]
    return list(dict.fromkeys([channels**-0.5, *stated]))


def _layouts(channels: int, table: int) -> list[RotaryLayout]:
    """Return every layout that tables of this width allow."""
    guesses = []
    for width, orders in ((table, ("halves", "interleaved", "first half")), (2 * table, ("single",))):
        starts = dict.fromkeys((0, channels - width)) if width <= channels and width % 2 == 0 else ()
        guesses += [
            RotaryLayout(start, width, interleaved, order)
            for start in starts
            for interleaved in (False, True)
            for order in orders
        ]
    return guesses
