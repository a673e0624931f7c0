"""Record a fault-free pass, so that the runs of its input need not compute it again.

    recording = record(subject, chain, batch)        # Recording, or the reason why runs cannot begin at a block
    with resumed(chain, recording, layer):
        subject.forward(batch, injector)             # does not compute the blocks before the layer's block

Memory: by token, the hidden states of all blocks, and queries, keys, values and outputs of the attention modules, all
references to tensors of the pass itself; scores and weights are not kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import ProjectedOperand
from experiments.effects.loss import Evaluation, loss_and_logits
from experiments.inputs.blocks import Arguments, Chain, hidden_of
from experiments.passes.subject import Evaluate, Subject
from experiments.passes.taps.call_state import Origins
from fault_injection import AttentionCore, Tap, instrumentation_of
from fault_injection.attention.instrument import substituted
from fault_injection.numbers.model_outputs import bitwise_equal


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One evaluation of a core that dispatches through the attention interface.

    Attributes:
        core: the core.
        query: (B, H, T, d); key: (B, H_kv, S, d); value: (B, H_kv, S, d_v).
        mask, keywords: what the attention function was given beside them.
        out: (B, T, H, d_v), its output.
        projected: by "q", "k", "v", the origin of each operand; None if not requested.
    """

    core: AttentionCore
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    keywords: Mapping[str, Any]
    out: Tensor
    projected: Mapping[str, ProjectedOperand] | None = None

    @property
    def group(self) -> int:
        """Number of query heads that read one key/value head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True, eq=False)
class Recording:
    """One fault-free pass.

    Attributes:
        hidden: the input of each block, (B, T, D), and finally the output of the last block.
        arguments: all arguments of each block.
        outputs: the output of each block.
        attention: by layer, the evaluations of cores of path A.
        evaluation: loss and output of the pass.
    """

    hidden: tuple[Tensor, ...]
    arguments: tuple[Arguments, ...]
    outputs: tuple[Any, ...]
    attention: Mapping[int, AttentionRecord]
    evaluation: Evaluation

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that the recording keeps alive, the output included."""
        tensors = [*self.hidden, self.evaluation.output]
        for kept in self.attention.values():
            tensors += [kept.query, kept.key, kept.value, kept.out]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def record(
    subject: Subject, chain: Chain, batch: Mapping[str, Tensor], *taps: Tap, origins: Origins | None = None
) -> Recording | str:
    """Return what ``recorded_pass`` does, without the evaluation."""
    return recorded_pass(subject, chain, batch, *taps, origins=origins)[1]


def recorded_pass(
    subject: Subject,
    chain: Chain,
    batch: Mapping[str, Tensor],
    *taps: Tap,
    origins: Origins | None = None,
    evaluate: Evaluate = loss_and_logits,
) -> tuple[Evaluation, Recording | str]:
    """Run a fault-free pass; return its evaluation, and what runs can begin from or why they cannot.

    Args:
        subject: the model, patched.
        chain: its blocks.
        batch: as ``Subject.to_device`` returns it.
        taps: see the pass too.
        origins: tells where the operands of a core come from (``taps.origins.recorded_origins``, entered).
        evaluate: see ``Subject.forward``.
    """
    given: list[tuple[int, Tensor, Arguments, Any]] = []
    attention: dict[int, AttentionRecord] = {}
    versions: list[tuple[str, Tensor, int]] = []
    own = [block.forward for block in chain.blocks]
    instrumentation = instrumentation_of(subject.model)

    def note(what: str, *tensors: Tensor) -> None:
        versions.extend((what, tensor, tensor._version) for tensor in tensors)

    def block(number: int, hidden: Tensor, arguments: Arguments) -> Any:
        note(f"what block {number} reads", hidden)
        args, kwargs = arguments
        output = own[number](*args, **kwargs)
        given.append((number, hidden, arguments, output))
        return output

    def attend(core: AttentionCore, tensors: Any, mask: Any, keywords: Mapping[str, Any]) -> Any:
        result = instrumentation.evaluate_interface(core, tensors, mask, keywords)
        note(f"a tensor of {core.name}", *tensors, result[0])
        projected = None if origins is None else origins(core)
        query, key, value = tensors
        attention[core.index] = AttentionRecord(core, query, key, value, mask, keywords, result[0], projected)
        return result

    with chain.replaced(block), substituted(subject.model, attend):
        evaluation = subject.forward(batch, *taps, evaluate=evaluate)
    if (reason := _no_chain(chain, given)) is not None:
        return evaluation, reason
    overwritten = next((what for what, tensor, version in versions if tensor._version != version), None)
    if overwritten is not None:
        return evaluation, f"{overwritten} is overwritten later in the pass"
    hidden = (*(entry[1] for entry in given), hidden_of(given[-1][3]))
    arguments = tuple(entry[2] for entry in given)
    return evaluation, Recording(hidden, arguments, tuple(entry[3] for entry in given), attention, evaluation)


def _no_chain(chain: Chain, given: list[tuple[int, Tensor, Arguments, Any]]) -> str | None:
    if [number for number, *_ in given] != list(range(len(chain.blocks))):
        return "its blocks do not run once each, in order"
    for (number, *_, output), (_, following, *_) in itertools.pairwise(given):
        if not bitwise_equal(hidden_of(output), following):
            return f"block {number + 1} reads something else than block {number} returns"
    return None


def resumed(chain: Chain, recording: Recording, layer: int) -> AbstractContextManager[None]:
    """Return a context in which the blocks in front of the one with attention layer ``layer`` return what they did."""
    first = chain.block_of[layer]
    if first == 0:
        return nullcontext()
    own = [block.forward for block in chain.blocks]

    def block(number: int, hidden: Tensor, arguments: Arguments) -> Any:
        args, kwargs = arguments
        return recording.outputs[number] if number < first else own[number](*args, **kwargs)

    return chain.replaced(block)


def changed_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return which rows of two tensors of one shape (N, ...) have different bits, (N,) bool."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    differ = left.contiguous().view(integer) != right.contiguous().view(integer)
    return differ.flatten(1).any(1)
