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
| ``suites`` | names for lists of detectors |
| ``verdict``, ``row_check``, ``row_outcome`` | from residuals, row by row, to what a detector says |
| ``sequences`` | groups of heads as sequences, each judged on its own |
| ``fixed_order``, ``selection`` | sums that depend on their own terms alone; entries that are not read |
| ``projection_*``, ``range_*`` | queries, keys and values against weights and input |
| ``score_*`` | the score product |
| ``softmax_*``, ``epsilon_*`` | the softmax |
| ``output_*``, ``key_value_identity`` | the value product |
| ``fused_*`` | kernels that show no scores |
| ``finite_detector`` | NaN and Inf |
| ``attnchecker``, ``ranger``, ``realm``, ``flash_abft`` | published methods to compare with |
| ``correction`` | repair of single located errors |
| ``certificate`` | what an undetected fault can have done at most |
| ``fault_effect``, ``atlas`` | what a fault does, in closed form; ranked over all faults of a layer |

Statements and proofs are in docs/theory.md. To add a detector of your own, write a subclass of ``Detector`` and give
its place in a configuration (``bounds.user_detectors``); in this package, decorate it with ``register_detector`` and
import its module here.

>>> from bounds.suites import expand
>>> expand(["lite"])
('finite', 'P_q', 'P_k', 'P_v', 'S_row', 'W_sum', 'W_simplex', 'O_row')
"""

from __future__ import annotations

from bounds import finite_detector
from bounds.core.attention_state import AttentionState
from bounds.core.detector import Detector, Verdict
from bounds.epsilon import epsilon_detectors
from bounds.epsilon.bounds import AttentionBounds, compute_attention_bounds
from bounds.epsilon.violations import Violations, detect_violation
from bounds.fused import fused_detectors
from bounds.products import element_detectors, output_detectors, score_detectors
from bounds.projections import projection_detectors
from bounds.published import attnchecker, flash_abft, ranger, realm
from bounds.ranges import range_detectors
from bounds.registry import get_detector, list_detectors, register_detector
from bounds.softmax import softmax_detectors

__all__ = [
    "AttentionBounds",
    "AttentionState",
    "Detector",
    "Verdict",
    "Violations",
    "attnchecker",
    "compute_attention_bounds",
    "detect_violation",
    "element_detectors",
    "epsilon_detectors",
    "finite_detector",
    "flash_abft",
    "fused_detectors",
    "get_detector",
    "list_detectors",
    "output_detectors",
    "projection_detectors",
    "range_detectors",
    "ranger",
    "realm",
    "register_detector",
    "score_detectors",
    "softmax_detectors",
]
