"""Invariants of attention with proved rounding tolerances, and the detectors built on them.

>>> import torch
>>> from bounds import AttentionState, compute_attention_bounds, detect_violation, get_detector
>>> logits = torch.tensor([[[[2.0, 1.0, 0.0], [0.5, 0.0, 1.5]]]])
>>> weights = logits.softmax(-1)
>>> detect_violation(compute_attention_bounds(logits, weights, d=64)).count
0
>>> weights[0, 0, 1, 2] *= 2                                       # a fault in one weight
>>> detect_violation(compute_attention_bounds(logits, weights, d=64)).count
1
>>> query, value = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
>>> state = AttentionState(query=query, key=value, value=value, logits=logits, weights=weights, out=weights @ value,
...                        scaling=0.5, kv_equal=True, has_bias_or_cap=False)
>>> get_detector("W_sum").check(state).positions                   # one attention call: batch, head, query
((0, 0, 1),)

| module | what |
|---|---|
| ``rounding`` | how far correct arithmetic may be from the real numbers |
| ``chain``, ``epsilon`` | the bounds of epsilon, in real numbers and with their tolerance |
| ``query_output`` | epsilon from query and output |
| ``violations`` | the decision |
| ``attention_state``, ``detector``, ``registry`` | the input of a detector, its base class, and the table of detectors
| | ``suites`` | names for lists of detectors |
| ``verdict``, ``row_check``, ``row_outcome`` | from residuals, row by row, to the verdict of a detector |
| ``sequences`` | groups of heads as sequences, each judged on its own |
| ``fixed_order``, ``selection`` | sums that depend only on their own terms; entries that are not read |
| ``projection_*``, ``range_*`` | queries, keys and values against weights and input |
| ``score_*`` | the score product |
| ``softmax_*``, ``epsilon_*`` | the softmax |
| ``output_*``, ``key_value_identity`` | the value product |
| ``fused_*`` | kernels that show no scores |
| ``finite_detector`` | NaN and Inf |
| ``attnchecker``, ``ranger``, ``realm``, ``flash_abft`` | published methods to compare with |
| ``correction`` | repair of single located errors |
| ``certificate`` | a bound on the effect of an undetected fault |
| ``fault_effect``, ``atlas`` | the effect of a fault, in closed form; all faults of a layer, ranked |

Statements and proofs are in docs/theory.md. A detector of your own is a subclass of ``Detector`` that a configuration
names (``bounds.user_detectors``); one of this package is named in ``bounds.registry.BUILT_IN``.

>>> from bounds.suites import expand
>>> expand(["lite"])
('finite', 'P_q', 'P_k', 'P_v', 'S_row', 'W_sum', 'W_simplex', 'O_row')
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
