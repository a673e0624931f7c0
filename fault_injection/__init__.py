"""Fault injection: bits, faults, sites and the instrumented attention.

from fault_injection import FaultSpec, SiteSurvey, draw_fault, injected, patched, tapped

with patched(model):
    survey = SiteSurvey(model.dtype)
    with tapped(model, survey):
        clean = model(**batch).logits
    fault = draw_fault(FaultSpec("scores", bits=(30,)), survey.site(0, "scores"), random)
    with injected(model, [fault]) as injector:
        faulty = model(**batch).logits
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
