"""The input of a detector: the tensors of one attention call.

    state = AttentionState(query=q, key=k, value=v, logits=a, weights=w, out=o, scaling=0.125, kv_equal=False,
                           has_bias_or_cap=False, visible=causal, layer=3, name="transformer.h.3.attn")
    get_detector("s@w").check(state)

>>> q = k = v = torch.zeros(1, 2, 3, 4)
>>> a = torch.zeros(1, 2, 3, 3)
>>> state = AttentionState(query=q, key=k, value=v, logits=a, weights=a + 1 / 3, out=v,
...                        scaling=0.5, kv_equal=True, has_bias_or_cap=False)
>>> state.rows, state.derived(lambda state: state.query.sum().item())
((1, 2, 3), 0.0)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class ProjectedOperand:
    """Where the queries, keys or values of a call come from.

    Attributes:
        hidden: (B, T, D), the input of the linear module.
        projected: (B, H, T, d), its output, ordered by head and channel; H is the number of key/value heads for keys
            and values.
        rotation: the cosines and sines that the attention module received; None without a rotary embedding.
        source: int64 (number of sequences,), the entry of ``hidden`` and ``rotation`` that each sequence of the call
            uses; sequences from the same entry share it without a copy. None: each has its own, or all share one.
    """

    hidden: Tensor
    projected: Tensor
    rotation: tuple[Tensor, Tensor] | None = None
    source: Tensor | None = None

    def by_sequence(self, tensor: Tensor) -> Tensor:
        """Return what was computed from ``hidden`` or ``rotation``, entry by entry, sequence by sequence."""
        return tensor if self.source is None or tensor.shape[0] == 1 else tensor[self.source]


@dataclass(frozen=True, eq=False)
class AttentionState:
    """The tensors of one attention call, as the computation itself saw them, on any one device.

    A state is compared by identity and never copies a tensor; do not change its tensors once a detector has read
    them, because derived statistics are kept.

    Attributes:
        query: (B, H, T, D), the left operand of the score product (after rotation, norm and pre-scaling).
        key: (B, H_kv, S, D), not repeated: query head h reads head h // (H / H_kv).
        value: (B, H_kv, S, D_v).
        logits: (B, H, T, S'), the input of the softmax. S' = S, or more if the softmax has sink columns.
        weights: (B, H, T, S'), the output of the softmax, before dropout, in its own dtype.
        out: (B, H, T, D_v), the product of weights and values.
        scaling: alpha, the factor between query.key and the logits.
        kv_equal: whether the *model* guarantees that ``key`` and ``value`` are equal tensors at this point (rotary
            embedding of the keys alone breaks it). Never read off the data: a fault must not change it.
        has_bias_or_cap: whether finite visible logits differ from scaling * query.key (position bias, ALiBi, soft
            cap); None when it is not known.
        scores: (B, H, T, S), the output of the score product, before scale and mask; optional. In real numbers it
            is ``score_factor * QK^T + score_addend`` at every position, masked ones included.
        score_factor: 1 for a plain product.
        score_addend: broadcastable to ``scores``; None if the product adds nothing (most architectures).
        mass: (B, H, T, S), the factor of the values: ``weights`` after cast, dropout and removal of a sink's column;
            the tensor ``weights`` itself if none of these happens. Optional.
        projected: by "q", "k", "v", the origin of each; operands with an unknown origin are missing. Optional.
        visible: bool, broadcastable to ``logits``, True where a query sees a key; None when every key is visible.
        heads: int64 (B, H), the numbers of these query heads in the whole call; None for all heads in order.
        layer: index of the layer, if it has one.
        name: qualified module name.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor
    weights: Tensor
    out: Tensor
    scaling: float
    kv_equal: bool
    has_bias_or_cap: bool | None
    scores: Tensor | None = None
    score_factor: float = 1.0
    score_addend: Tensor | None = None
    mass: Tensor | None = None
    projected: Mapping[str, ProjectedOperand] | None = None
    visible: Tensor | None = None
    heads: Tensor | None = None
    layer: int | None = None
    name: str = ""
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError when the shapes cannot belong to one attention call."""
        for tensor_name in ("query", "key", "value", "logits", "weights", "out"):
            tensor = getattr(self, tensor_name)
            if tensor.ndim != 4:
                raise ValueError(f"{tensor_name}: got shape {tuple(tensor.shape)}, allowed four axes")
        self._require(self.logits.shape[:3] == self.rows, "logits", f"({self.rows}..., keys)")
        self._require(self.weights.shape == self.logits.shape, "weights", tuple(self.logits.shape))
        self._require(self.out.shape[:3] == self.rows, "out", f"({self.rows}..., head size)")
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        self._require(kv_heads > 0 and heads % kv_heads == 0, "key", f"a number of heads that divides {heads}")
        self._require(self.value.shape[:3] == self.key.shape[:3], "value", f"{tuple(self.key.shape[:3])}...")
        if self.visible is not None and self.visible.dtype != torch.bool:
            raise ValueError(f"visible: got dtype {self.visible.dtype}, allowed bool (True = visible)")

    def _require(self, condition: bool, name: str, allowed: object) -> None:
        if not condition:
            raise ValueError(f"{name}: got shape {tuple(getattr(self, name).shape)}, allowed {allowed}")

    @property
    def rows(self) -> tuple[int, int, int]:
        """Shape (B, H, T) of the query rows."""
        batch, heads, rows = self.query.shape[:3]
        return batch, heads, rows

    def per_query_head(self, tensor: Tensor) -> Tensor:
        """Repeat a (B, H_kv, ...) tensor to (B, H, ...), the way grouped-query attention reads it."""
        return tensor.repeat_interleave(self.query.shape[1] // tensor.shape[1], dim=1)

    def of_heads(self, table: Tensor, operand: Tensor) -> Tensor:
        """Return the entries of a table over the heads of the whole call for the heads of this state.

        Args:
            table: (H_all, ...), as many as the whole call has of the operand's kind.
            operand: (B, H, ...) or (B, H_kv, ...), one of this state's tensors, which has the wanted heads.

        Returns:
            (H, ...), or (B, H, ...) if ``heads`` names them.
        """
        if self.heads is None:
            return table
        share = self.query.shape[1] // operand.shape[1]
        return table[self.heads[:, ::share] // share]

    def derived(self, factory: Callable[[AttentionState], Derived]) -> Derived:
        """Return ``factory(self)``, computed at most once: detectors that need the same statistics share them."""
        if factory not in self._derived:
            self._derived[factory] = factory(self)
        return cast(Derived, self._derived[factory])
