"""Watches what the blocks of a model return: in the fault-free pass to remember it, in injected ones to compare it.

blocks = Blocks(subject, batches, lambda: forward)
if blocks.reason is None:
watcher = blocks.watcher(blocks.outputs(0), layer=2)
with watcher:
subject.forward(batch, injector)
watcher.changes                          # {2: 0.013, 3: 0.011}: relative change behind each block
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.effects.block_outputs import BlockOutputs
from experiments.effects.row_kernels import changed_rows
from experiments.inputs.batches import real_positions
from experiments.inputs.blocks import Chain, block_chain, hidden_of
from experiments.passes.subject import Subject
from monitoring.cache.cached_forward import CachedForward

_See = Callable[[int, Any], None]


class Blocks:
    """The blocks of one model, and what they return on its inputs without a fault.

    Args:
        subject: the patched model.
        batches: on its device.
        forward: gives the cache, trace and counters that passes go through.
    """

    def __init__(
        self, subject: Subject, batches: Sequence[Mapping[str, Tensor]], forward: Callable[[], CachedForward]
    ) -> None:
        self._subject, self._batches, self._forward = subject, batches, forward
        self._last: tuple[tuple[int, str], BlockOutputs] | None = None

    @cached_property
    def reason(self) -> str | None:
        """Why there is no residual stream to follow in this model; None if there is. Takes one pass."""
        if isinstance(self._chain, str):
            return self._chain
        found = _returned(self._subject, self._chain, self._batches[0])
        return found if isinstance(found, str) else None

    def outputs(self, batch_index: int, model_id: str, run_id: str = "") -> BlockOutputs:
        """Return what the blocks return on a batch, from the forward cache where it is there.

        Args:
            batch_index: which batch.
            model_id: fingerprint of the model.
            run_id: of the run that asks, for the trace.

        Raises:
            RuntimeError: there is nothing to follow (``reason``).
        """
        key = batch_index, model_id
        if self._last is None or self._last[0] != key:
            self._last = None
            batch = self._batches[batch_index]

            def compute() -> BlockOutputs:
                found = self._chain if isinstance(self._chain, str) else _returned(self._subject, self._chain, batch)
                if isinstance(found, str):
                    raise RuntimeError(f"blocks of batch {batch_index}: {found}")
                return BlockOutputs.of(found, real_positions(batch).flatten().to(found[0].device))

            cached = self._forward().cached(
                "blocks", "base", dict(batch), {}, compute, model=model_id, phase="baseline", run_id=run_id
            )
            self._last = key, cached
        return self._last[1]

    def watcher(self, outputs: BlockOutputs, layer: int) -> BlockWatcher:
        """Return what compares the blocks from that of an attention layer on; ``RuntimeError`` as for ``outputs``."""
        if isinstance(self._chain, str):
            raise RuntimeError(self._chain)
        first = self._chain.block_of[layer]
        return BlockWatcher(self._chain.blocks, outputs, first, self._subject.synchronize)

    @cached_property
    def _chain(self) -> Chain | str:
        return block_chain(self._subject.model, self._subject.cores)


class BlockWatcher:
    """A context in which blocks are compared with the fault-free pass as they return.

    Args:
        blocks: all of the model.
        outputs: of the same input without a fault.
        first: number of the first block that can differ.
        synchronize: called before every reading of the clock.

    Attributes:
        changes: by number of the block, see ``BlockOutputs.changes``.
        seconds: time spent here.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        outputs: BlockOutputs,
        first: int,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.changes: dict[int, float] = {}
        self.seconds = 0.0
        self._blocks = list(enumerate(blocks))[first:]
        self._outputs, self._synchronize = outputs, synchronize
        self._stack = ExitStack()

    def __enter__(self) -> BlockWatcher:
        self._stack.enter_context(_watched(self._blocks, self._see))
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def _see(self, number: int, output: Any) -> None:
        self._synchronize()
        start = time.perf_counter()
        values, clean = hidden_of(output).flatten(0, 1), self._outputs.rows[number]
        every = torch.arange(len(clean), device=clean.device)
        rows = changed_rows(clean, every, values).nonzero().flatten()
        (change,) = self._outputs.changes(number, rows, values.index_select(0, rows), torch.zeros_like(rows), 1)
        self.changes[number] = change
        self._synchronize()
        self.seconds += time.perf_counter() - start


@contextmanager
def _watched(blocks: Iterable[tuple[int, nn.Module]], see: _See) -> Iterator[None]:
    with ExitStack() as stack:
        for number, block in blocks:
            stack.enter_context(block.register_forward_hook(partial(_hook, see, number)))
        yield


def _hook(see: _See, number: int, block: nn.Module, inputs: Any, output: Any) -> None:
    see(number, output)


def _returned(subject: Subject, chain: Chain, batch: Mapping[str, Tensor]) -> list[Tensor] | str:
    """Return what the blocks return in a fault-free pass, each (B, T, D), or why this is not a residual stream."""
    found: list[tuple[int, Tensor | None]] = []

    def keep(number: int, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        # A later block may write into what it is given.
        found.append((number, first.detach().clone() if isinstance(first, Tensor) else None))

    with _watched(enumerate(chain.blocks), keep):
        subject.forward(batch)
    if [number for number, _ in found] != list(range(len(chain.blocks))):
        return "its blocks do not run once each, in order"
    hidden = [tensor for _, tensor in found if tensor is not None]
    tokens = batch["input_ids"].shape
    if len(hidden) < len(found) or any(each.ndim != 3 or each.shape[:2] != tokens for each in hidden):
        return "a block does not return one vector for each token"
    return hidden
