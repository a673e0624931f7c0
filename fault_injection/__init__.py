"""What is broken: bits, faults, sites and the instrumented attention.

from fault_injection import FaultSpec, SiteSurvey, draw_fault, injected, patched, tapped

with patched(model):
    survey = SiteSurvey(model.dtype)
    with tapped(model, survey):
        clean = model(**batch).logits
    fault = draw_fault(FaultSpec("scores", bits=(30,)), survey.site(0, "scores"), random)
    with injected(model, [fault]) as injector:
        faulty = model(**batch).logits
"""

from fault_injection.attention.call import LOCATIONS, OBSERVED, AttentionCall, AttentionCore, ScoreProduct, Tap
from fault_injection.attention.discovery import NoAttentionError, UncoveredArchitectureError
from fault_injection.attention.instrument import attention_cores, instrumentation_of, is_patched, suspended, tapped
from fault_injection.attention.probe import ProbeError
from fault_injection.faults.fault import KINDS, Fault, FaultSpec, draw_fault
from fault_injection.faults.injector import FaultMissedError, InjectionRecord, Injector, injected
from fault_injection.faults.layer_choice import LAYER_MODES, candidate_layers, choose_layers
from fault_injection.faults.site import ElementIndex, Site, SiteSurvey
from fault_injection.monkey_patch import monkey_patch_model, patched, unpatch_model
from fault_injection.numbers.bits import bit_field, bit_patterns, clear_bits, flip_bits, rewrite_bits, set_bits
from fault_injection.operands.kv_consistency import KVConsistency, check_kv_consistency, force_kv_consistent

__all__ = [
    "KINDS",
    "LAYER_MODES",
    "LOCATIONS",
    "OBSERVED",
    "AttentionCall",
    "AttentionCore",
    "ElementIndex",
    "Fault",
    "FaultMissedError",
    "FaultSpec",
    "InjectionRecord",
    "Injector",
    "KVConsistency",
    "NoAttentionError",
    "ProbeError",
    "ScoreProduct",
    "Site",
    "SiteSurvey",
    "Tap",
    "UncoveredArchitectureError",
    "attention_cores",
    "bit_field",
    "bit_patterns",
    "candidate_layers",
    "check_kv_consistency",
    "choose_layers",
    "clear_bits",
    "draw_fault",
    "flip_bits",
    "force_kv_consistent",
    "injected",
    "instrumentation_of",
    "is_patched",
    "monkey_patch_model",
    "patched",
    "rewrite_bits",
    "set_bits",
    "suspended",
    "tapped",
    "unpatch_model",
]
