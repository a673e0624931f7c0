"""The two checks that stand before every campaign: the equivalence gate and the control run.

The gate shows that the patched model without a fault gives, bit for bit, the logits of the model's own eager attention
on the campaign's first batch. The control run shows that injecting a fault that changes no bit, through the very path
that real faults take, gives a difference of exactly zero in loss and output.

Public names: ``equivalence_gate``, ``control_run``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def equivalence_gate(subject: Subject, batch: Mapping[str, Tensor]) -> None:
    """Compare the patched model with its own eager attention on ``batch``.

    Raises:
        CheckRefusedError: they differ (the message names the first layer that does), or the clean output is not
            finite.
    """
    with suspended(subject.model), _attention_outputs(subject) as expected_layers:
        expected = subject.forward(batch)
    with _attention_outputs(subject) as got_layers:
        got = subject.forward(batch)
    if not bool(torch.isfinite(expected.output).all()):
        raise CheckRefusedError(
            f"equivalence gate: the fault-free output of {type(subject.model).__name__} in {subject.dtype} is not "
            "finite on the first batch; no fault could be told from it"
        )
    if bitwise_equal(expected.output, got.output):
        return
    first = next(
        (
            name
            for name in subject.layer_names
            if not all(map(bitwise_equal, expected_layers.get(name, []), got_layers.get(name, [])))
        ),
        "none of the attention layers (the difference arises elsewhere)",
    )
    difference = float((expected.output.double() - got.output.double()).abs().max())
    raise CheckRefusedError(
        "equivalence gate: the patched model without a fault differs from the model's own eager attention by up to "
        f"{difference:.3g}; the first layer that differs is {first}. The campaign does not start"
    )


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
    """Inject a fault that changes nothing at every location of every layer, one layer per location and pass.

    Raises:
        CheckRefusedError: the loss or a logit differs from the baseline by anything but exactly 0.
    """
    for location in LOCATIONS:
        faults = [_no_op(sites[core.index, location]) for core in subject.cores if (core.index, location) in sites]
        with injected(subject.model, faults):
            control = subject.forward(batch)
        same_loss = control.loss == baseline.loss
        if not (same_loss and bitwise_equal(control.output, baseline.output)):
            difference = float((control.output.double() - baseline.output.double()).abs().max())
            raise CheckRefusedError(
                f"control run: a fault in {location} that changes no bit changed the output by up to {difference:.3g} "
                f"(loss {baseline.loss!r} -> {control.loss!r}); pairs would not be comparable"
            )


def _no_op(site: Site) -> Fault:
    element = Element(0, float_format(site.dtype).all_bits, 0)
    dtype = str(site.dtype).removeprefix("torch.")
    return Fault(site.location, site.layer, site.module, "bitflip", dtype, site.shape, (0, 0, 0, 0), (), (element,))


def check_clean_correction(subject: Subject, batch: Mapping[str, Tensor], baseline: Baseline) -> None:
    """Let a corrector look at the fault-free pass of ``batch``, in which it has nothing to do.

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
