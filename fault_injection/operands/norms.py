"""Recognise normalisation layers by what they compute, whatever their class is called.

A norm maps a vector h to ``gain * z + offset`` with ``z = (h - mean h) / sqrt(var h + eps)`` (LayerNorm), or with
``z = h / sqrt(mean h^2 + eps)`` (RMSNorm). Either way z is no longer than sqrt(width).

    norm = recognised_norm(module, given, returned)        # None if it computes something else
    norm.gain(), norm.offset()

>>> layer = nn.LayerNorm(4)
>>> norm = recognised_norm(layer, h := torch.randn(3, 4), layer(h))
>>> norm.centred, norm.gain().tolist()
(True, [1.0, 1.0, 1.0, 1.0])
>>> recognised_norm(nn.Tanh(), h, h.tanh()) is None
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

_EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation over the last axis.

    Attributes:
        module: the layer.
        width: length of the vectors it normalises.
        centred: whether it subtracts the mean.
        unit_gain: what is added to the weight to give the gain (1 in architectures whose weights are around 0).
        epsilon: what is added to the variance or mean square; positive.
    """

    module: nn.Module
    width: int
    centred: bool
    unit_gain: float
    epsilon: float

    def gain(self) -> Tensor:
        """Return the gain as the weights are now, float64, (width,)."""
        weight = cast("Tensor | None", getattr(self.module, "weight", None))
        if weight is None:
            return torch.ones(self.width, dtype=torch.float64)
        return weight.detach().double() + self.unit_gain

    def offset(self) -> Tensor:
        """Return the offset as the weights are now, float64, (width,); zeros if it has none."""
        bias = cast("Tensor | None", getattr(self.module, "bias", None))
        return torch.zeros_like(self.gain()) if bias is None else bias.detach().double()

    def normalised(self, vectors: Tensor) -> Tensor:
        """Return z of float64 ``vectors``, (..., width)."""
        centred = vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.epsilon)


def recognised_norm(module: nn.Module, given: Tensor, returned: Tensor) -> Norm | None:
    """Return what ``module`` normalises if that is all it does to ``given``, else ``None``.

    Args:
        module: any module.
        given: (..., width), what it got in one evaluation.
        returned: what it returned.
    """
    epsilon = next((getattr(module, name) for name in _EPSILON_NAMES if hasattr(module, name)), None)
    if not isinstance(epsilon, float) or epsilon < 1e-30 or not _plausible(module, given, returned):
        return None
    for centred in (False, True):
        for unit_gain in (0.0, 1.0):
            norm = Norm(module, given.shape[-1], centred, unit_gain, epsilon)
            if _explains(norm, given, returned):
                return norm
    return None


def _plausible(module: nn.Module, given: Tensor, returned: Tensor) -> bool:
    if given.shape != returned.shape or not (given.is_floating_point() and returned.is_floating_point()):
        return False
    vectors = [getattr(module, name, None) for name in ("weight", "bias")]
    return all(
        vector is None
        or (isinstance(vector, Tensor) and vector.shape == given.shape[-1:] and vector.is_floating_point())
        for vector in vectors
    )


def _explains(norm: Norm, given: Tensor, returned: Tensor) -> bool:
    """Whether ``returned`` is what the norm computes, up to a generous bound on its rounding errors."""
    vectors, gain, offset = given.detach().double(), norm.gain(), norm.offset()
    expected = norm.normalised(vectors) * gain
    # Norms compute in float32 even inside a float64 model.
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (given, returned, torch.empty(0)))
    allowed = (norm.width + 64) * 2.0**-24 + 3 * coarsest
    floor = 1e-30 + 4 * torch.finfo(returned.dtype).smallest_normal * coarsest * (1 + gain.abs().max())
    if norm.centred:
        # What subtracting a mean loses is relative to the numbers it is subtracted from.
        size = torch.rsqrt(vectors.var(-1, keepdim=True, unbiased=False) + norm.epsilon) * gain.abs()
        magnitude = expected.abs() + (vectors.abs() + vectors.mean(-1, keepdim=True).abs()) * size + offset.abs()
    else:
        magnitude = expected.abs() + offset.abs()
    return bool(((returned.double() - expected - offset).abs() <= allowed * magnitude + floor).all())
