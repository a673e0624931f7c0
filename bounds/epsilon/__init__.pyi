from .bounds import AttentionBounds as AttentionBounds
from .bounds import compute_attention_bounds as compute_attention_bounds
from .violations import Violations as Violations
from .violations import detect_violation as detect_violation
