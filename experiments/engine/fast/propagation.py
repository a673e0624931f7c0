"""The changed rows of many runs, through the blocks behind their faults.

    wave = Wave(subject, chain, recording)
    hidden = wave.behind_site(layer, rows, out)      # block of the layer, on the rows that the faults changed
    hidden = wave.through(number, pack, hidden)      # a block behind it, on the rows that can have changed
    logits = wave.head(hidden)

Every row of a pack goes through a block's own code; only its attention is ours: the rows of a run are the queries, and
keys and values are those of the fault-free pass with the run's rows in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from experiments.engine.fast.pack import TILE, Pack, Stretch, packed_arguments, tiled
from experiments.engine.fast.recording import AttentionRecord, Recording
from experiments.engine.fast.site_step import Keeper
from experiments.engine.fast.wide_linear import OutputBuffer, WideLinear
from experiments.inputs.blocks import Arguments, Chain, hidden_of, with_hidden
from experiments.passes.subject import Subject
from fault_injection import AttentionCore, instrumentation_of, tapped
from fault_injection.attention.discovery import eager_function
from fault_injection.attention.instrument import Evaluate, substituted

ATTENTION_ELEMENTS = 1 << 20
"""Scores of one attention batch: 4 MB of float32, so that they stay in a cache."""

LARGEST = 1e17
"""Runs with larger queries, keys or values go through whole sequences: their products may overflow, and what is not
finite reaches rows in front of the fault (0 times infinity is NaN under a causal mask, too). Some thousand squares of
it are finite in float32 and bfloat16."""

Look = Callable[[AttentionRecord, Keeper, Sequence[Stretch]], None]
"""Called with what an attention batch of whole sequences computed, and which they were."""


def window_start(start: int, length: int) -> int:
    """Return where the queries of a stretch from ``start`` begin: at a multiple of TILE, and TILE rows at least."""
    return max(0, min(start // TILE * TILE, length - TILE))


class Wave:
    """Runs the blocks of a model on packs of rows of one input.

    Args:
        subject: the patched model.
        chain: its blocks.
        recording: the fault-free pass of the input.
        buffer: where a wide head writes its output, piece by piece; None: as the model does it.
        whole: every stretch begins at 0, so numbers of any size stay where they belong.
        look: sees the attention of such stretches, and that of the control run, which need not be whole.

    Attributes:
        escaped: the runs that must be taken through whole sequences (``LARGEST``); what was computed of them is void.
    """

    def __init__(
        self,
        subject: Subject,
        chain: Chain,
        recording: Recording,
        buffer: OutputBuffer | None = None,
        *,
        whole: bool = False,
        look: Look | None = None,
    ) -> None:
        self._whole, self._look = whole, look
        self._subject, self._chain, self._recording = subject, chain, recording
        self._buffer = buffer
        self._clean = [hidden.flatten(0, 1) for hidden in recording.hidden]
        sequences, length = recording.hidden[0].shape[:2]
        self.shape = sequences, length
        self.escaped: set[int] = set()

    def clean(self, number: int, rows: Tensor) -> Tensor:
        """Return the fault-free hidden state in front of block ``number``, (N, D)."""
        return self._clean[number][rows]

    def behind_site(self, layer: int, rows: Tensor, out: Tensor) -> Tensor:
        """Return what the block of an attention layer returns, where its attention returned something else.

        Args:
            layer: the layer.
            rows: (N,), N a multiple of TILE.
            out: (N, H, d_v), the outputs of its attention at these rows.

        Returns:
            (N, D), the hidden state behind the block.
        """

        def attention(core: AttentionCore, tensors: Any, mask: Any, keywords: Mapping[str, Any]) -> Any:
            return tiled(out), None

        number = self._chain.block_of[layer]
        return self._block(number, rows, self.clean(number, rows), attention)

    def through(self, number: int, pack: Pack, hidden: Tensor) -> Tensor:
        """Return (N, D) behind block ``number`` for the rows of a pack, given those in front of it."""

        def attention(core: AttentionCore, tensors: Any, mask: Any, keywords: Mapping[str, Any]) -> Any:
            kept = self._recording.attention[core.index]
            query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors)
            self._watch(pack, query, key, value)
            out = torch.empty((len(query), query.shape[1], value.shape[-1]), dtype=kept.out.dtype, device=query.device)
            for first, last in self._attention_batches(pack, query.shape[1], kept.key.shape[2]):
                begin, end = pack.spans[first][0], pack.spans[last - 1][1]
                part = slice(begin, end)
                out[part] = self._attend(kept, pack, first, last, query[part], key[part], value[part])
            return tiled(out), None

        return self._block(number, pack.rows, hidden, attention)

    def head(self, hidden: Tensor) -> Tensor:
        """Return what the model makes of (N, D) behind its last block: logits (N, V), or states of an encoder.

        They are valid until the next call.
        """

        def block(number: int, given: Tensor, arguments: Arguments) -> Any:
            output = self._recording.outputs[number]
            return (tiled(hidden), *output[1:]) if isinstance(output, tuple) else tiled(hidden)

        wide = nullcontext() if self._buffer is None else WideLinear(self._buffer)
        with torch.no_grad(), self._chain.replaced(block), wide:
            return self._subject.answer(len(hidden) // TILE, TILE).flatten(0, 1)

    def _block(self, number: int, rows: Tensor, hidden: Tensor, attention: Evaluate) -> Tensor:
        packed = packed_arguments(self._recording.arguments[number], rows, self.shape)
        args, kwargs = with_hidden(tiled(hidden), packed)
        with torch.no_grad(), substituted(self._subject.model, attention):
            return hidden_of(self._chain.blocks[number](*args, **kwargs)).flatten(0, 1)

    def _watch(self, pack: Pack, *operands: Tensor) -> None:
        """Note the runs whose operands are too large, or no numbers."""
        if self._whole:
            return
        for operand in operands:
            low, high = torch.aminmax(operand)
            if not (float(low) > -LARGEST and float(high) < LARGEST):
                beyond = ~(operand.abs().amax((1, 2)) < LARGEST)
                self.escaped |= set(pack.owner[beyond].tolist())

    def _attention_batches(self, pack: Pack, heads: int, keys: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of stretches with one window, few enough for one batch."""
        length = self.shape[1]
        windows = [window_start(stretch.start, length) for stretch in pack.stretches]
        first = 0
        while first < len(windows):
            most = max(1, ATTENTION_ELEMENTS // (heads * (length - windows[first]) * keys))
            last = first + 1
            while last < len(windows) and last - first < most and windows[last] == windows[first]:
                last += 1
            yield first, last
            first = last

    def _attend(
        self, kept: AttentionRecord, pack: Pack, first: int, last: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Return the attention outputs (n, H, d_v) of the rows of some stretches with one window."""
        length, stretches = self.shape[1], pack.stretches[first:last]
        start = window_start(stretches[0].start, length)
        window, runs = length - start, len(stretches)
        sequence = torch.tensor([stretch.sequence for stretch in stretches], device=query.device)
        counts = torch.tensor([length - stretch.start for stretch in stretches], device=query.device)
        run = torch.arange(runs, device=query.device).repeat_interleave(counts)
        begin, end = pack.spans[first][0], pack.spans[last - 1][1]
        position = pack.rows[begin:end] % length
        queries = query.new_zeros((runs * window, *query.shape[1:]))
        slot = run * window + (position - start)
        queries[slot] = query
        place = run * kept.key.shape[2] + position
        keys, values = (
            _with_rows(clean, sequence, place, rows) for clean, rows in ((kept.key, key), (kept.value, value))
        )
        mask = kept.mask
        if mask is not None:
            mask = (mask[sequence] if mask.shape[0] > 1 else mask)[:, :, start:]
        tensors = queries.unflatten(0, (runs, window)).transpose(1, 2), keys, values
        if self._look is None or start:
            out = _evaluated(kept, tensors, mask)
        else:
            keeper = Keeper(overwritten=False)
            with tapped(self._subject.model, keeper):
                interface = instrumentation_of(self._subject.model).evaluate_interface
                out = interface(kept.core, tensors, mask, kept.keywords)[0]
            self._look(kept, keeper, stretches)
        return out.flatten(0, 1)[slot]


def _evaluated(kept: AttentionRecord, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> Tensor:
    function = eager_function(kept.core.module)
    if function is None:
        raise RuntimeError(f"{kept.core.name}: its eager attention function is gone")
    out: Tensor = function(kept.core.module, *tensors, mask, **kept.keywords)[0]
    return out


def _with_rows(clean: Tensor, sequence: Tensor, place: Tensor, rows: Tensor) -> Tensor:
    """Return keys or values (F, H, S, d) of the fault-free pass with some rows replaced."""
    copies = clean.transpose(1, 2).index_select(0, sequence)
    copies.flatten(0, 1)[place] = rows
    return copies.transpose(1, 2)
