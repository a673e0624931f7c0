"""Fault injection: bits, faults, sites and the instrumented attention.

>>> import numpy, torch, transformers
>>> from fault_injection import ElementIndex, FaultSpec, SiteSurvey, draw_fault, injected, patched, tapped
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 1, 4, 1]])
>>> with patched(model):
...     survey = SiteSurvey(model.dtype)
...     with tapped(model, survey):
...         clean = model(tokens).logits
...     last_row = FaultSpec("scores", bits=(30,), index=ElementIndex(row=3))
...     fault = draw_fault(last_row, survey.site(0, "scores"), numpy.random.default_rng(0))
...     with injected(model, [fault]) as injector:
...         faulty = model(tokens).logits
>>> [record.changed for record in injector.records], torch.equal(clean, faulty)
([1], False)
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
