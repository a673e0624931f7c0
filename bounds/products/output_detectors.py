"""The detectors of the value product: the output must be the product of weights and values.

| name | what must hold | rows |
|---|---|---|
| ``O_row`` | a row of the output sums to ``sum_j w_ij (sum_c v_jc)`` | (batch, head, query) |
| ``O4_row`` | the same for every 4 channels | (batch, head, query, group) |
| ``O_col`` | a column of the output sums to ``sum_j (sum_i w_ij) v_jc`` | (batch, head, channel) |
| ``O_hull`` | no channel leaves the range of its values and 0 | (batch, head, channel) |
| ``O_norm`` | no row is longer than the longest value | (batch, head, query) |
| ``KV`` | ``q_i . o_i = sum_j w_ij s_ij / factor``, where the model has K = V | (batch, head, query) |

The sums see faults of the product and of its stored output and nothing else: weights or values that are wrong before
the product have a right output (docs/theory.md, T9). Hull and norm also see weights that sum to more than 1.

>>> import torch
>>> mass, value = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
>>> out = mass @ value
>>> out[0, 0, 1, 0] += 9.0                                                       # a fault
>>> state = AttentionState(query=out, key=value, value=value, logits=mass, weights=mass, mass=mass, out=out,
...                        scaling=1.0, kv_equal=False, has_bias_or_cap=False)
>>> OutputRows().check(state).positions, OutputColumns().check(state).positions, KeyValue().check(state).reason
(((0, 0, 1),), ((0, 0, 0),), 'it reads scores, which this state does not carry')
"""

from __future__ import annotations

import weakref
from dataclasses import replace

from torch import nn

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck
from bounds.products import output_hull, output_sums
from bounds.products.key_value_identity import identity
from bounds.products.product_detector import ProductDetector, key_counts, required, value_product
from bounds.registry import register_detector

GROUP = 4
"""Number of channels of a group of ``O4_row``."""


def output_rows(state: AttentionState) -> RowCheck:
    """Return the check of the rows of the output, (B, H, T) (F8), for ``state.derived``."""
    mass, out, seen = state.derived(value_product)
    return replace(output_sums.row_sums(mass, state.value, out, state.derived(key_counts)), checked=seen)


def output_groups(state: AttentionState) -> RowCheck:
    """Return the check of groups of channels, (B, H, T, groups) (F8), for ``state.derived``."""
    mass, out, seen = state.derived(value_product)
    check = output_sums.group_sums(mass, state.value, out, state.derived(key_counts), width=GROUP)
    return replace(check, checked=None if seen is None else seen[..., None])


def output_columns(state: AttentionState) -> RowCheck:
    """Return the check of the columns of the output, (B, H, D_v) (F8), for ``state.derived``."""
    mass, out, _ = state.derived(value_product)
    return output_sums.column_sums(mass, state.value, out)


def output_channels(state: AttentionState) -> RowCheck:
    """Return the check of the channels' ranges, (B, H, D_v) (F9), for ``state.derived``."""
    mass, out, _ = state.derived(value_product)
    return output_hull.channel_hull(state.value, out, output_hull.mass_reach(state.weights, mass))


def output_lengths(state: AttentionState) -> RowCheck:
    """Return the check of the rows' lengths, (B, H, T) (F9), for ``state.derived``."""
    mass, out, seen = state.derived(value_product)
    check = output_hull.length_hull(state.value, out, output_hull.mass_reach(state.weights, mass))
    return replace(check, checked=seen)


def key_value_rows(state: AttentionState) -> RowCheck:
    """Return the check of the K = V identity, (B, H, T) (F10), for ``state.derived``."""
    mass, out, seen = state.derived(value_product)
    scores, keys = required(state, "scores"), state.derived(key_counts)
    check = identity(state.query, state.key, scores, mass, out, state.score_factor, keys)
    return replace(check, checked=seen)


class _OutputDetector(ProductDetector):
    """Shared by the detectors of the value product. Units of the residual and of ``tolerance``: output."""

    needs = frozenset({"value", "mass", "out"})
    operand = "value"


@register_detector
class OutputRows(_OutputDetector):
    """Sums of rows."""

    name = "O_row"
    statement = "sum_c o_ic = sum_j w_ij (sum_c v_jc) (T7, F8)"
    cost = "n + d"
    equation = staticmethod(output_rows)


@register_detector
class OutputGroups(_OutputDetector):
    """Sums of groups of 4 channels."""

    name = "O4_row"
    statement = "sum_c o_ic = sum_j w_ij (sum_c v_jc) over every 4 channels (T7, F8)"
    cost = "n d / 4"
    equation = staticmethod(output_groups)


@register_detector
class OutputColumns(_OutputDetector):
    """Sums of columns."""

    name = "O_col"
    statement = "sum_i o_ic = sum_j (sum_i w_ij) v_jc (T7, F8)"
    cost = "n + d"
    equation = staticmethod(output_columns)


class _HullDetector(_OutputDetector):
    """Shared by the detectors that rely on a row's masses summing to 1 or less."""

    needs = frozenset({"value", "weights", "mass", "out"})

    def __init__(self, tolerance: float = 0.0) -> None:
        super().__init__(tolerance)
        self._model: weakref.ref[nn.Module] | None = None

    def prepare(self, model: nn.Module) -> None:
        """Remember the model, to know when its dropout may be on."""
        self._model = weakref.ref(model)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the output may leave the hull of the values, or None when it must not.

        That is asked of the model, not of the weights: a fault must not be able to switch the detector off. A detector
        that was not prepared takes it that no dropout is on.
        """
        model = None if self._model is None else self._model()
        if model is not None and model.get_submodule(state.name).training:
            return "the model is training: dropout may scale the weights up, so that they sum to more than 1"
        return super().applicable(state)


@register_detector
class OutputHull(_HullDetector):
    """Ranges of channels."""

    name = "O_hull"
    statement = "min(0, min_j v_jc) <= o_ic <= max(0, max_j v_jc) over all keys (F9)"
    cost = "d"
    equation = staticmethod(output_channels)


@register_detector
class OutputNorm(_HullDetector):
    """Lengths of rows."""

    name = "O_norm"
    statement = "|o_i| <= max_j |v_j| over all keys (F9)"
    cost = "d"
    equation = staticmethod(output_lengths)


@register_detector
class KeyValue(_OutputDetector):
    """The identity of a model whose keys and values are equal. Units of the residual and of ``tolerance``: q.k."""

    name = "KV"
    needs = frozenset({"query", "key", "value", "scores", "mass", "out"})
    statement = "q_i . o_i = sum_j w_ij s_ij / factor, where the model has K = V (T6, F10)"
    cost = "n + d"
    equation = staticmethod(key_value_rows)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why q.o need not be the weighted mean of the scores, or None when it must."""
        if (reason := super().applicable(state)) is not None:
            return reason
        if not state.kv_equal:
            return "the model does not guarantee equal keys and values here, so q.o is no weighted mean of the scores"
        if state.score_addend is not None or state.score_factor == 0:
            return "the score product adds a bias or multiplies by 0: the scores are not factor * q.k"
        return None
