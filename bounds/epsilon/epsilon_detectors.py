"""The detectors of the epsilon chain.

| name | what must hold | reads |
|---|---|---|
| ``s@w`` | epsilon of logits and weights is within the bounds of the same pass | logits, weights |
| ``s@w_tight`` | the same with the best bounds that gamma, n and w* allow (T4) | logits, weights |
| ``q@o`` | epsilon of query and output is within them, widened by the slack of T6 | all but scores |
| ``comb`` | both | all but scores |
| ``oracle_...`` | the same against the bounds of the fault-free pass | its reduced statistics |

A theorem limits what they can see (docs/theory.md, T5): logits and weights that belong together satisfy the chain for
any logits, so ``s@w`` sees only faults in the weights, besides non-finite values.

>>> import torch
>>> from bounds import AttentionState, get_detector
>>> logits, values = torch.tensor([0.3, -1.2, 0.8]).view(1, 1, 1, 3), torch.eye(3).view(1, 1, 3, 3)
>>> weights = torch.softmax(logits, -1)
>>> state = AttentionState(query=logits, key=values, value=values, logits=logits, weights=weights,
...                        out=weights @ values, scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> get_detector("comb").check(state).violations
0
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Detector, Verdict
from bounds.core.row_outcome import BoundedOutcome, fires_if_one_does, verdict, verdicts
from bounds.epsilon.bounds import Interval
from bounds.epsilon.epsilon_statistics import (
    EpsilonBaseline,
    epsilon_baseline,
    epsilon_bounds,
    query_output,
    query_output_interval,
    tight_epsilon_bounds,
)
from bounds.epsilon.query_output import query_output_reason
from bounds.epsilon.violations import row_outcome
from bounds.registry import register_detector


def _weights_interval(state: AttentionState, baseline: Any) -> Interval:
    """Return where epsilon of the s@w path must lie: the call's own interval, or the fault-free pass's."""
    if baseline is None:
        return state.derived(epsilon_bounds).interval()
    return _matching(state, baseline).weights


def _output_interval(state: AttentionState, baseline: Any) -> Interval:
    """Return where epsilon of the q@o path must lie: the call's own interval, or the fault-free pass's."""
    if baseline is None:
        return state.derived(query_output_interval)
    interval = _matching(state, baseline).output
    if interval is None:
        raise ValueError("baseline: it has no interval of the q@o path, T6 did not apply to the fault-free pass")
    return interval


def _matching(state: AttentionState, baseline: Any) -> EpsilonBaseline:
    if not isinstance(baseline, EpsilonBaseline):
        raise ValueError(f"baseline: got {type(baseline).__name__}, allowed EpsilonBaseline (what reduce() returns)")
    rows = tuple(baseline.weights.lower.shape)
    if rows not in (state.rows, (1, *state.rows[1:])):
        raise ValueError(f"baseline: got rows {rows}, but this call has {state.rows}")
    return baseline


class _EpsilonDetector(Detector):
    """Shared by the detectors of the chain; an oracle takes the interval from the fault-free pass."""

    per_group = True

    def reduce(self, state: AttentionState) -> EpsilonBaseline | None:
        """Return the intervals of the fault-free pass for an oracle, else None."""
        return state.derived(epsilon_baseline) if self.oracle else None

    def derive(self, state: AttentionState) -> None:
        """Compute epsilon and its bounds."""
        state.derived(epsilon_bounds)

    @abstractmethod
    def outcome(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Return what is found in every row with a visible key."""

    def by_weights(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Compare epsilon of logits and weights with its bounds."""
        return row_outcome(_weights_interval(state, baseline), state.derived(epsilon_bounds).epsilon, self.tolerance)

    def by_output(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Compare epsilon of query and output with its bounds."""
        return row_outcome(_output_interval(state, baseline), state.derived(query_output).epsilon, self.tolerance)

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every row with a visible key."""
        return verdict(self.name, self.outcome(state, baseline))

    def check_each(self, state: AttentionState, baseline: Any = None) -> list[Verdict]:
        """Judge the rows of each sequence, all at once."""
        if (refused := self.refused(state, baseline)) is not None:
            return [refused] * state.rows[0]
        return verdicts(self.name, self.outcome(state, baseline))


@register_detector
class WeightsDetector(_EpsilonDetector):
    """Epsilon from logits and weights."""

    name = "s@w"
    needs = frozenset({"logits", "weights"})
    statement = "max(lower1, middle) <= (a* - sum w a) / alpha <= min(upper1, upper2) (T2, tolerance F2)"
    cost = "n"

    # Rows of fewer keys lie on their bounds (T3): they have no say in the smallest margin.
    least_keys = 3

    def outcome(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Return what is found along the path of the weights."""
        return self.by_weights(state, baseline).among(state.derived(epsilon_bounds).n >= self.least_keys)


@register_detector
class TightWeightsDetector(WeightsDetector):
    """Epsilon from logits and weights in the narrowest interval."""

    name = "s@w_tight"
    statement = "(a* - sum w a) / alpha lies in the best bounds given gamma, n and w* (T4, tolerance F2, F3)"
    cost = "n exp"

    def derive(self, state: AttentionState) -> None:
        """Compute epsilon and the bounds T4."""
        state.derived(tight_epsilon_bounds)

    # Gamma and w* determine E of rows of fewer keys.
    least_keys = 4

    def by_weights(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Compare epsilon of logits and weights with the narrowest interval."""
        bounds = state.derived(tight_epsilon_bounds)
        return row_outcome(bounds.interval(), bounds.epsilon, self.tolerance)


@register_detector
class OutputDetector(_EpsilonDetector):
    """Epsilon from query and output."""

    name = "q@o"
    needs = frozenset({"query", "key", "value", "logits", "weights", "out"})
    statement = "lower - slack <= a* / alpha - q.o <= upper + slack, slack = |q| max |v - k| (T6, tolerance F4)"
    cost = "n + d"

    def derive(self, state: AttentionState) -> None:
        """Compute epsilon along both paths, and its bounds."""
        super().derive(state)
        if self.applicable(state) is None:
            state.derived(query_output_interval)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why T6 says nothing about ``state``, or None when it applies."""
        return super().applicable(state) or query_output_reason(state)

    def outcome(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Return what is found along the path of query and output."""
        return self.by_output(state, baseline)


@register_detector
class CombinedDetector(OutputDetector):
    """Either path; it applies where both do, so that its rate never silently means one of them alone."""

    name = "comb"
    statement = "s@w and q@o both hold (T2, T6)"

    def outcome(self, state: AttentionState, baseline: Any) -> BoundedOutcome:
        """Return what is found along either path."""
        return fires_if_one_does(self.by_weights(state, baseline), self.by_output(state, baseline))


@register_detector
class OracleWeightsDetector(WeightsDetector):
    """Epsilon from logits and weights against the bounds of the fault-free pass."""

    name = "oracle_s@w"
    oracle = True
    statement = "epsilon of logits and weights lies in the fault-free pass's bounds (T2, T5d)"
    cost = "n, and a second pass"


@register_detector
class OracleOutputDetector(OutputDetector):
    """Epsilon from query and output against the bounds and slack of the fault-free pass."""

    name = "oracle_q@o"
    oracle = True
    statement = "epsilon of query and output lies in the fault-free pass's bounds and slack (T6, T5d)"
    cost = "n + d, and a second pass"


@register_detector
class OracleCombinedDetector(CombinedDetector):
    """Either path against the bounds of the fault-free pass."""

    name = "oracle_comb"
    oracle = True
    statement = "oracle_s@w and oracle_q@o both hold (T2, T6, T5d)"
    cost = "n + d, and a second pass"
