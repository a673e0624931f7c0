"""What must hold: invariants of attention with proved rounding tolerances, and the detectors built on them.

    verdict = get_detector("s@w").check(state)                 # state: AttentionState, one attention call
    bounds = compute_attention_bounds(logits, weights, d=64, mask=visible)
    detect_violation(bounds).count

| module | what |
|---|---|
| ``rounding`` | how far correct arithmetic may be from the real numbers |
| ``chain``, ``epsilon`` | the bounds of epsilon, in real numbers and with their tolerance |
| ``query_output`` | epsilon from query and output |
| ``violations`` | the decision |
| ``attention_state``, ``detector``, ``registry`` | what a detector reads, is, and where it is found |
| ``epsilon_detectors``, ``finite_detector`` | the detectors |

Statements and proofs are in docs/theory.md. To add a detector: subclass ``Detector``, decorate it with
``register_detector``, import its module here.

>>> list_detectors()
('comb', 'finite', 'oracle_comb', 'oracle_q@o', 'oracle_s@w', 'q@o', 's@w')
"""

from __future__ import annotations

from bounds import epsilon_detectors, finite_detector
from bounds.attention_state import AttentionState
from bounds.detector import Detector, Verdict
from bounds.epsilon import AttentionBounds, compute_attention_bounds
from bounds.registry import get_detector, list_detectors, register_detector
from bounds.violations import Violations, detect_violation

__all__ = [
    "AttentionBounds",
    "AttentionState",
    "Detector",
    "Verdict",
    "Violations",
    "compute_attention_bounds",
    "detect_violation",
    "epsilon_detectors",
    "finite_detector",
    "get_detector",
    "list_detectors",
    "register_detector",
]
