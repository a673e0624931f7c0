"""The factor between q·k and the logits, as path-R architectures state it.

Path A passes the factor to the attention function; the older architectures keep it in an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

_STATED: dict[str, Callable[[nn.Module], float]] = {
    "GPTNeoSelfAttention": lambda module: 1.0,
    "GPTJAttention": lambda module: 1.0 / float(module.scale_attn),  # type: ignore[arg-type]
    "GPT2Attention": lambda module: float(module.scaling),  # type: ignore[arg-type]
    "BloomAttention": lambda module: float(module.inv_norm_factor),  # type: ignore[arg-type]
    "FalconAttention": lambda module: 1.0 / math.sqrt(module.head_dim),  # type: ignore[arg-type]
    "MptAttention": lambda module: float(module.softmax_scale),  # type: ignore[arg-type]
}


def stated_scaling(module: nn.Module) -> float | None:
    """Return the factor alpha of ``logit = alpha q·k + bias`` for a path-R module; ``None`` if it is unknown."""
    stated = _STATED.get(type(module).__name__)
    return None if stated is None else stated(module)
