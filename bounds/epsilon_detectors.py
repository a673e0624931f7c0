"""The detectors of the epsilon chain.

| name | what must hold | reads |
|---|---|---|
| ``s@w`` | epsilon of logits and weights lies in the bounds of the same pass | logits, weights |
| ``s@w_tight`` | the same with the best bounds that gamma, n and w* allow (T4) | logits, weights |
| ``q@o`` | epsilon of query and output lies in them, widened by the slack of T6 | all but scores |
| ``comb`` | both | all but scores |
| ``oracle_...`` | the same against the bounds of the fault-free pass | its reduced statistics |

What they can see is limited by theorem (docs/theory.md, T5): logits and weights that belong together satisfy the
chain whatever the logits are, so ``s@w`` sees faults in the weights only, besides non-finite values.

>>> from bounds import AttentionState, get_detector
>>> logits, values = torch.tensor([0.3, -1.2, 0.8]).view(1, 1, 1, 3), torch.eye(3).view(1, 1, 3, 3)
>>> weights = torch.softmax(logits, -1)
>>> state = AttentionState(query=logits, key=values, value=values, logits=logits, weights=weights,
...                        out=weights @ values, scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> get_detector("comb").check(state).violations
0
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bounds.attention_state import AttentionState
from bounds.detector import Detector, Verdict, extreme, first_positions
from bounds.epsilon import Interval
from bounds.epsilon_statistics import (
    EpsilonBaseline,
    epsilon_baseline,
    epsilon_bounds,
    query_output,
    query_output_interval,
    tight_epsilon_bounds,
)
from bounds.query_output import query_output_reason
from bounds.registry import register_detector
from bounds.violations import Violations, detect_violation


def _verdict(name: str, found: Violations) -> Verdict:
    return Verdict(
        detector=name,
        rows_checked=found.rows_checked,
        violations=found.count,
        nonfinite=found.nonfinite,
        positions=first_positions(found.positions),
        largest_ratio=found.largest_ratio,
        smallest_margin=found.smallest_margin,
    )


def _either(name: str, first: Violations, second: Violations) -> Verdict:
    """Return the verdict of a row check that fires where one of two does; both judged the same rows."""
    fired = first.fired | second.fired
    # A row that is not finite on one path counts once, whatever the other path says.
    nonfinite = first.nonfinite_rows | second.nonfinite_rows
    return Verdict(
        detector=name,
        rows_checked=first.rows_checked,
        violations=int(fired.sum()),
        nonfinite=int(nonfinite.sum()),
        positions=first_positions(fired.nonzero()),
        largest_ratio=extreme(torch.max, first.largest_ratio, second.largest_ratio),
        smallest_margin=extreme(torch.min, first.smallest_margin, second.smallest_margin),
    )


def _with_margin(name: str, found: Violations, wide: Tensor) -> Verdict:
    """Return the verdict with the smallest margin of the rows in ``wide``: others lie on their bounds."""
    margins = found.margins[wide]
    return replace(_verdict(name, found), smallest_margin=float(margins.min()) if margins.numel() else None)


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
    if rows != state.rows:
        raise ValueError(f"baseline: got rows {rows}, but this call has {state.rows}")
    return baseline


class _EpsilonDetector(Detector):
    """Shared by the detectors of the chain; an oracle differs from its online twin in where the interval comes from."""

    def reduce(self, state: AttentionState) -> EpsilonBaseline | None:
        """Return the intervals of the fault-free pass for an oracle, else None."""
        return state.derived(epsilon_baseline) if self.oracle else None

    def derive(self, state: AttentionState) -> None:
        """Compute epsilon and its bounds."""
        state.derived(epsilon_bounds)

    def by_weights(self, state: AttentionState, baseline: Any) -> Violations:
        """Judge epsilon of logits and weights."""
        interval = _weights_interval(state, baseline)
        return detect_violation(interval, state.derived(epsilon_bounds).epsilon, self.tolerance)

    def by_output(self, state: AttentionState, baseline: Any) -> Violations:
        """Judge epsilon of query and output."""
        interval = _output_interval(state, baseline)
        return detect_violation(interval, state.derived(query_output).epsilon, self.tolerance)


@register_detector
class WeightsDetector(_EpsilonDetector):
    """Epsilon from logits and weights."""

    name = "s@w"
    needs = frozenset({"logits", "weights"})
    statement = "max(lower1, middle) <= (a* - sum w a) / alpha <= min(upper1, upper2) (T2, tolerance F2)"
    cost = "n"

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every row with a visible key.

        The smallest margin is over the rows with more than two of them: the others lie on their bounds (T3).
        """
        found = self.by_weights(state, baseline)
        return _with_margin(self.name, found, state.derived(epsilon_bounds).n > 2)


@register_detector
class TightWeightsDetector(WeightsDetector):
    """Epsilon from logits and weights in the narrowest interval."""

    name = "s@w_tight"
    statement = "(a* - sum w a) / alpha lies in the best bounds given gamma, n and w* (T4, tolerance F2, F3)"
    cost = "n exp"

    def derive(self, state: AttentionState) -> None:
        """Compute epsilon and the bounds T4."""
        state.derived(tight_epsilon_bounds)

    def by_weights(self, state: AttentionState, baseline: Any) -> Violations:
        """Judge epsilon of logits and weights."""
        bounds = state.derived(tight_epsilon_bounds)
        return detect_violation(bounds.interval(), bounds.epsilon, self.tolerance)

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every row with a visible key.

        The smallest margin is over the rows with more than three of them: gamma and w* determine E of the others.
        """
        found = self.by_weights(state, baseline)
        return _with_margin(self.name, found, state.derived(tight_epsilon_bounds).n > 3)


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

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every row with a visible key."""
        return _verdict(self.name, self.by_output(state, baseline))


@register_detector
class CombinedDetector(OutputDetector):
    """Either path; it applies where both do, so that its rate never silently means one of them alone."""

    name = "comb"
    statement = "s@w and q@o both hold (T2, T6)"

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every row with a visible key."""
        return _either(self.name, self.by_weights(state, baseline), self.by_output(state, baseline))


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
