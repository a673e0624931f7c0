"""The epsilon bounds of attention rows: from weights, from outputs, and the decision.

Public names: ``AttentionBounds``, ``compute_attention_bounds``, ``Violations``, ``detect_violation``.
"""

from bounds.epsilon.bounds import AttentionBounds, compute_attention_bounds
from bounds.epsilon.violations import Violations, detect_violation

__all__ = ["AttentionBounds", "Violations", "compute_attention_bounds", "detect_violation"]
