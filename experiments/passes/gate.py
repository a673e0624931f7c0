"""The two checks before every campaign: the equivalence gate and the control run.

The gate shows that the patched model without a fault gives, bit for bit, the logits of the model's own eager attention
on the campaign's first batch (in a replay: on the batch of the run). The pass of the patched model is the one that runs
are then compared with. The control run shows that injecting a fault that changes no bit, through the very path that
real faults take, gives a difference of exactly zero in loss and output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from experiments.effects.loss import Evaluation
from experiments.errors import CheckRefusedError
from experiments.passes.baseline import Baseline
from experiments.passes.subject import Subject
from experiments.passes.taps.corrector import Corrector
from fault_injection import LOCATIONS, Fault, Site, injected, suspended
from fault_injection.faults.fault import Element
from fault_injection.numbers.bits import float_format
from fault_injection.numbers.model_outputs import bitwise_equal, output_tensors


def equivalence_gate(
    subject: Subject, batch: Mapping[str, Tensor], patched: Callable[[], Evaluation] | None = None
) -> None:
    """Compare the patched model with its own eager attention on ``batch``.

    Args:
        subject: the patched model.
        batch: as ``Subject.to_device`` returns it.
        patched: gives what a fault-free pass of the patched model gave, if there is one anyway (default: it is made).

    Raises:
        CheckRefusedError: they differ (the message names the first layer that does), or the clean output is not
            finite.
    """
    with suspended(subject.model):
        expected = subject.forward(batch)
    if not bool(torch.isfinite(expected.output).all()):
        raise CheckRefusedError(
            f"equivalence gate: the fault-free output of {type(subject.model).__name__} in {subject.dtype} is not "
            "finite on the batch that is checked; no fault could be told from it"
        )
    got = subject.forward(batch) if patched is None else patched()
    if bitwise_equal(expected.output, got.output):
        return
    difference = float((expected.output.double() - got.output.double()).abs().max())
    raise CheckRefusedError(
        "equivalence gate: the patched model without a fault differs from the model's own eager attention by up to "
        f"{difference:.3g}; the first layer that differs is {_first_difference(subject, batch)}. The campaign does not "
        "start"
    )


def _first_difference(subject: Subject, batch: Mapping[str, Tensor]) -> str:
    """Return the first attention layer whose output the patch changes, found by both passes once more."""
    with suspended(subject.model), _attention_outputs(subject) as expected:
        subject.forward(batch)
    with _attention_outputs(subject) as got:
        subject.forward(batch)
    differing = (
        name for name in subject.layer_names if not all(map(bitwise_equal, expected.get(name, []), got.get(name, [])))
    )
    return next(differing, "none of the attention layers (the difference arises elsewhere)")


@contextmanager
def _attention_outputs(subject: Subject) -> Iterator[dict[str, list[Tensor]]]:
    """Record the first output tensor of every attention module, for the diagnosis alone."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found.setdefault(name, []).extend(tensor.detach().clone() for tensor in output_tensors(output)[:1])

        return hook

    handles = [core.module.register_forward_hook(note(core.name)) for core in subject.cores]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def control_run(
    subject: Subject, batch: Mapping[str, Tensor], baseline: Evaluation, sites: Mapping[tuple[int, str], Site]
) -> None:
    """Inject a fault that changes nothing at every location of every layer, all in one pass.

    Where they change something, each location is tried alone, to name it.

    Raises:
        CheckRefusedError: the loss or a logit differs from the baseline by anything but exactly 0.
    """
    every = [(core.index, location) for location in LOCATIONS for core in subject.cores]
    faults = [_no_op(sites[place]) for place in every if place in sites]
    control = _injected(subject, batch, faults)
    if _same(control, baseline):
        return
    name = "all locations together"
    for location in LOCATIONS:
        alone = _injected(subject, batch, [fault for fault in faults if fault.location == location])
        if not _same(alone, baseline):
            name, control = location, alone
            break
    difference = float((control.output.double() - baseline.output.double()).abs().max())
    raise CheckRefusedError(
        f"control run: a fault in {name} that changes no bit changed the output by up to {difference:.3g} "
        f"(loss {baseline.loss!r} -> {control.loss!r}); pairs would not be comparable"
    )


def _injected(subject: Subject, batch: Mapping[str, Tensor], faults: Sequence[Fault]) -> Evaluation:
    with injected(subject.model, faults):
        return subject.forward(batch)


def _same(control: Evaluation, baseline: Evaluation) -> bool:
    return control.loss == baseline.loss and bitwise_equal(control.output, baseline.output)


def _no_op(site: Site) -> Fault:
    element = Element(0, float_format(site.dtype).all_bits, 0)
    dtype = str(site.dtype).removeprefix("torch.")
    return Fault(site.location, site.layer, site.module, "bitflip", dtype, site.shape, (0, 0, 0, 0), (), (element,))


def check_clean_correction(subject: Subject, batch: Mapping[str, Tensor], baseline: Baseline) -> None:
    """Run a corrector in the fault-free pass of ``batch``, where it must find nothing to repair.

    Raises:
        CheckRefusedError: it found something, or the output is not bitwise that of the plain pass.
    """
    corrector = Corrector(baseline.situation.visible)
    corrected = subject.forward(batch, corrector)
    if corrector.repairs:
        first = corrector.repairs[0]
        raise CheckRefusedError(
            f"control run: correction finds {len(corrector.repairs)} errors in the fault-free pass, the first in "
            f"{first.location} of layer {first.layer} at {first.index} ({first.status}); no repair could be trusted"
        )
    if not bitwise_equal(corrected.output, baseline.evaluation.output):
        raise CheckRefusedError("control run: the fault-free pass gives another output when correction looks at it")
