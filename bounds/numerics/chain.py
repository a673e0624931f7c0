"""The epsilon chain in real numbers: bounds on ``E = max - weighted mean`` of one softmax row.

For a row with n visible logits a_j, weights w = softmax(a), largest logit a*, gap gamma to the second largest and
w* the weight of the largest, the quantity ``E = a* - sum_j w_j a_j`` obeys (docs/theory.md, T2)

    gamma / (1 + e^gamma)  <=  gamma (1 - w*)  <=  E  <=  min(a* - mean a, U(n, gamma)).

These are the pure kernels; ``bounds.epsilon.bounds`` applies them to tensors of an attention layer.

>>> row = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)            # all other logits tie: middle = E
>>> weights = torch.softmax(row, -1)
>>> lower1, middle, upper1, upper2 = chain_bounds(
...     torch.tensor(1.0), torch.tensor(1.0), weights[0], row.mean(), torch.tensor(3))
>>> spread = 1.0 - (weights * row).sum()
>>> bool(lower1 < middle), abs(float(middle - spread)) < 1e-15, bool(spread < torch.minimum(upper1, upper2))
(True, True, True)
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from scipy.special import lambertw
from torch import Tensor


@functools.lru_cache(maxsize=16)
def _lambert_table(size: int, device: str) -> Tensor:
    # U2 depends on a row through n alone, so W0 is evaluated once per possible n, never per row.
    others = np.maximum(np.arange(size) - 1, 0)
    return torch.from_numpy(np.real(lambertw(others / np.e))).to(device)


def lambert_table(largest: int, device: torch.device | str = "cpu") -> Tensor:
    """Return W0((n - 1) / e) for n = 0..largest (and perhaps beyond), float64, indexed by n.

    W0 is the principal branch of Lambert's W: ``W0(x) e^{W0(x)} = x``. Entry 0 is 0 by convention.
    """
    return _lambert_table(1 << max(largest, 1).bit_length(), str(device))


def chain_bounds(
    a_star: Tensor, gamma: Tensor, w_star: Tensor, mean: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lower1, middle, upper1, upper2 of ``E`` (docs/theory.md, T2), in the units of the logits.

    Args:
        a_star: (...,) largest visible logit.
        gamma: (...,) gap to the second largest, 0 for a tie; ignored where n = 1.
        w_star: (...,) weight of the largest.
        mean: (...,) mean of the visible logits.
        n: (...,) integer number of visible keys. Rows with n <= 1 get 0 everywhere (T3: E = 0 there).
    """
    several = n > 1
    zero = torch.zeros((), dtype=gamma.dtype, device=gamma.device)
    others = (n - 1).clamp(min=0)
    lambert = lambert_table(int(n.max()) if n.numel() else 1, n.device)[n]
    second = torch.exp(-gamma)
    decay = others * second
    upper2 = torch.where(gamma <= lambert + 1, lambert, gamma * decay / (1 + decay))
    bounds = (gamma * (second / (1 + second)), gamma * (1 - w_star), a_star - mean, upper2)
    lower1, middle, upper1, upper2 = (torch.where(several, bound, zero) for bound in bounds)
    return lower1, middle, upper1, upper2


def tight_bounds(gamma: Tensor, tail: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best possible lower and upper bound of ``E`` given gamma, n and w* (docs/theory.md, T4).

    They are rounded outwards by what float64 arithmetic may do to them (F3), so that they hold as they are.

    Args:
        gamma: (...,) float64 gap between the two largest logits.
        tail: (...,) float64 ``S = 1 / w* - 1``, the sum of ``exp(a_j - a*)`` over the other keys.
        n: (...,) integer number of visible keys. Rows with n <= 1 get 0.
    """
    zero = torch.zeros((), dtype=gamma.dtype, device=gamma.device)
    second = torch.exp(-gamma)
    # The second largest key alone contributes e^-gamma; rounding must not leave less than that.
    tail = torch.maximum(tail, second)
    w_star = 1 / (1 + tail)
    others = (n.double() - 1).clamp(min=1)  # an integer tensor would send its logarithm through float32
    full = torch.where(second > 0, torch.floor(tail / second), zero).clamp(min=1)
    full = torch.minimum(full, others)
    rest = (tail - full * second).clamp(min=0)
    lower = w_star * (full * gamma * second + _entropy_term(rest))
    spread = (tail - second).clamp(min=0)
    # n - 2 keys share the rest of the mass equally at the maximum: -sum p ln p = spread ln((n - 2) / spread).
    equal = _entropy_term(spread) + spread * torch.log((others - 1).clamp(min=1))
    upper = w_star * (gamma * second + torch.where(others > 1, equal, zero))
    rounding = 2.0**-45 * (n.double() + 1024) * (1 + upper)
    return torch.where(n > 1, lower - rounding, zero), torch.where(n > 1, upper + rounding, zero)


def _entropy_term(p: Tensor) -> Tensor:
    """Return ``-p ln p``, 0 at p = 0."""
    return -torch.xlogy(p, p)
