"""Where the queries, keys or values of an attention core come from: the noun that ``operand_sources`` finds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fault_injection.operands.norms import Norm
from fault_injection.operands.operand_tails import Tail
from fault_injection.operands.sparse_code import Projection


@dataclass(frozen=True, eq=False)
class OperandSource:
    """How an operand comes from the weights.

    Attributes:
        projection: the features that make it, ordered by head and channel. A head that the architecture repeats for
            grouped queries is there as often.
        heads: number of heads.
        tail: what the features pass through before the attention product reads them.
        norm: the norm whose output the projection reads, or why there is none.
    """

    projection: Projection
    heads: int
    tail: Tail
    norm: Norm | str

    @cached_property
    def features(self) -> slice | Tensor:
        """Index of the features in the module's output: a slice where they are contiguous."""
        rows = self.projection.rows
        start, stop = int(rows[0]), int(rows[0]) + len(rows)
        return slice(start, stop) if torch.equal(rows, torch.arange(start, stop)) else rows
