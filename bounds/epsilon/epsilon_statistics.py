"""The epsilon quantities of one attention call, computed once and shared by every detector that reads them.

    state.derived(epsilon_bounds)            # AttentionBounds of the softmax
    state.derived(query_output_interval)     # the interval of the q@o path

These are functions of a state for ``AttentionState.derived``, which keeps their results.
"""

from __future__ import annotations

from dataclasses import dataclass

from bounds.core.attention_state import AttentionState
from bounds.epsilon.bounds import AttentionBounds, Interval, compute_attention_bounds
from bounds.epsilon.query_output import QueryOutput, compute_query_output, query_output_reason


@dataclass(frozen=True, eq=False)
class EpsilonBaseline:
    """What the oracles remember of the fault-free pass: a few numbers per row, no tensor of the call itself.

    Attributes:
        weights: interval of the s@w path.
        output: interval of the q@o path, with its slack and tolerance; None where T6 does not apply.
    """

    weights: Interval
    output: Interval | None


def epsilon_bounds(state: AttentionState) -> AttentionBounds:
    """Return the bounds of the call's logits and weights."""
    return compute_attention_bounds(
        state.logits, state.weights, state.query.shape[-1], state.visible, scale=state.scaling
    )


def tight_epsilon_bounds(state: AttentionState) -> AttentionBounds:
    """Return the same with the interval T4, at the cost of one exp per logit."""
    bounds = compute_attention_bounds(
        state.logits, state.weights, state.query.shape[-1], state.visible, scale=state.scaling, tight=True
    )
    return bounds.tightened()


def query_output(state: AttentionState) -> QueryOutput:
    """Return epsilon by the q@o path. Raises ValueError where T6 does not apply."""
    return compute_query_output(state, state.derived(epsilon_bounds))


def query_output_interval(state: AttentionState) -> Interval:
    """Return the interval in which epsilon by the q@o path must lie. Raises ValueError where T6 does not apply."""
    path = state.derived(query_output)
    return state.derived(epsilon_bounds).interval(path.slack, path.tolerance)


def epsilon_baseline(state: AttentionState) -> EpsilonBaseline:
    """Return what the oracles need of a fault-free call."""
    applies = query_output_reason(state) is None
    return EpsilonBaseline(
        weights=state.derived(epsilon_bounds).interval(),
        output=state.derived(query_output_interval) if applies else None,
    )
