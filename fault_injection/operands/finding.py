"""Find out how every operand of every attention core comes from the weights.

An origin says which features of which linear module make the operand, which steps follow (the *tail*), and which norm
comes before. Codes find the features (``sparse_code``). Tail and norm are guessed. A guess is accepted only if it
explains the arriving numbers within its proved tolerance, both for the model's own data and for random data with large
queries and small keys (and vice versa), so that clipping cannot stay hidden.

    sources = operand_sources(model)["model.layers.0.self_attn"]
    sources["q"].projection.weight(), sources["q"].tail.kind        # ..., 'rotated'
    sources["v"].norm.gain()
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fault_injection.attention.call import AttentionCall, AttentionCore
from fault_injection.attention.example_inputs import example_inputs as make_example_inputs
from fault_injection.attention.instrument import attention_cores, evaluation_mode, tapped
from fault_injection.operands.operand_recorder import OperandRecorder
from fault_injection.operands.operand_source import OperandSource as OperandSource
from fault_injection.operands.operand_tails import Tail
from fault_injection.operands.sparse_code import CodeReader, Projection, SparseCode, instrumented, unscaled_rotations
from fault_injection.operands.tail_candidates import NormReader, Observation, explained_tail

OPERANDS = {"q": "queries", "k": "keys", "v": "values"}
"""The operands, and what people call them."""

_NAMES = {
    "q": ("q_proj", "query", "q_lin", "q"),
    "k": ("k_proj", "key", "k_lin", "k"),
    "v": ("v_proj", "value", "v_lin", "v"),
}
_UNREACHED = "the example inputs do not reach it; pass example_inputs= that do"

Sources = dict[str, dict[str, OperandSource | str]]
_known: WeakKeyDictionary[nn.Module, Sources] = WeakKeyDictionary()


def operand_sources(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> Sources:
    """Return the origins of "q", "k" and "v" for every attention core, by qualified name, or why one is not known.

    The model may be patched or not, and stays unchanged. The function runs a few small forward passes, which every tap
    of
    an open session would see: call it outside of sessions. It remembers the result as long as the model lives.

    Args:
        model: a Hugging Face model.
        example_inputs: keyword arguments of a small forward pass with several positions, as for
            ``monkey_patch_model``. With them, everything is measured again; without, a remembered result is returned.

    Raises:
        NoAttentionError, UncoveredArchitectureError: as for ``monkey_patch_model``.
    """
    if example_inputs is None and model in _known:
        return _known[model]
    inputs = make_example_inputs(model) if example_inputs is None else example_inputs
    with instrumented(model, inputs), evaluation_mode(model):
        cores = attention_cores(model)
        sources = _origins(model, inputs, cores)
        observer = _Observer(sources)
        norms = NormReader()
        with norms.hooked(model), observer.watching(model):
            model(**inputs)
        for sizes in ({"q": 10, "k": -10, "v": 9}, {"q": -10, "k": 10, "v": -9}):
            with _random_outputs(sources, sizes), observer.watching(model):
                model(**inputs)
        far = _far_positions(model, inputs)
        if far is not None:
            # Some architectures scale queries by their position; near the beginning the factor is 1.
            with observer.watching(model):
                model(**{**inputs, "position_ids": far})
    for core in cores:
        for operand, source in sources[core.name].items():
            if isinstance(source, OperandSource):
                seen = observer.seen.get((core.index, operand), [])
                sources[core.name][operand] = _measured(core, operand, source, seen, norms)
    _known[model] = sources
    return sources


def _far_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the last positions that the model has, (batch, position); ``None`` if it takes or has none."""
    tokens, config = inputs.get("input_ids"), getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not takes or "position_ids" in inputs or not isinstance(tokens, Tensor) or not isinstance(longest, int):
        return None
    last = torch.arange(longest - tokens.shape[-1], longest, device=tokens.device)
    return last.expand(tokens.shape) if longest > tokens.shape[-1] else None


def _origins(model: nn.Module, inputs: Mapping[str, Any], cores: Sequence[AttentionCore]) -> Sources:
    """Return which features make the operands; their tails and norms are still to be measured."""
    code = SparseCode([module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))])
    reader = CodeReader(code, frozenset(OPERANDS))
    with unscaled_rotations(model):
        for digit in range(code.digits):
            with reader.hooked(digit), tapped(model, reader):
                model(**inputs)
    return {core.name: {operand: _origin(core, cores, operand, reader) for operand in OPERANDS} for core in cores}


def _origin(
    core: AttentionCore, cores: Sequence[AttentionCore], operand: str, reader: CodeReader
) -> OperandSource | str:
    numbers = reader.numbers.get((core.index, operand))
    if numbers is None:
        return _UNREACHED
    owner = reader.keys_of[core.index]
    if operand != "q" and owner != core.index:
        return f"it has no {OPERANDS[operand]} of its own but reuses those of {cores[owner].name}"
    projection = _from_code(numbers, reader.code) or _from_names(core.module, operand, numbers, reader)
    if projection is None:
        return f"its {OPERANDS[operand]} were not recognised as features of one linear module"
    if (
        operand == "q"
        and getattr(core.module, "attn_temperature_tuning", False)
        and not getattr(core.module, "use_rope", True)
    ):
        # llama4: by the row of the sequence, whatever position_ids say, and by 1 in a sequence short enough to run here
        return "its queries are scaled by their row in long sequences, which short dry runs do not show"
    weight = cast(Tensor, projection.module.weight)
    if not weight.dtype.is_floating_point:
        return f"the projection of its {OPERANDS[operand]} is quantised ({weight.dtype})"
    return OperandSource(projection, heads=len(numbers), tail=Tail(), norm="it was not measured")


def _from_code(numbers: Tensor, code: SparseCode) -> Projection | None:
    """Return the features (head, channel) if every code arrived; a head may be there several times."""
    heads = [tuple(head) for head in numbers.tolist()]
    distinct = list(dict.fromkeys(heads))
    projection = code.projection([number for head in distinct for number in head])
    if projection is None:
        return None
    rows = projection.rows.view(len(distinct), -1)[[distinct.index(head) for head in heads]]
    return Projection(projection.module, rows.flatten())


def _from_names(core: nn.Module, operand: str, numbers: Tensor, reader: CodeReader) -> Projection | None:
    for name in _NAMES[operand]:
        module = getattr(core, name, None)
        if module is None and operand == "v" and getattr(core, "use_alternative_attention", False):
            module = getattr(core, "k_proj", None)  # gemma4's `attention_k_eq_v`: one module projects both
        if isinstance(module, nn.Module) and module in reader.sources:
            features = reader.code.features(module)
            return Projection(module, torch.arange(features)) if features == numbers.numel() else None
    return None


@contextmanager
def _random_outputs(sources: Sources, sizes: Mapping[str, int]) -> Iterator[None]:
    """Let the projections put out random numbers around 2**size, by operand."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[nn.Module, list[tuple[Tensor, int]]] = {}
    for of_core in sources.values():
        for operand, source in of_core.items():
            if isinstance(source, OperandSource):
                rows.setdefault(source.projection.module, []).append((source.projection.rows, sizes[operand]))

    def replacement(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator)
        for chosen, size in rows[module]:
            noise[..., chosen] *= 2.0**size
        return noise.to(output)

    handles = [module.register_forward_hook(replacement) for module in rows]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """As a tap, keeps what the first call of every core reads, with where it comes from.

    Attributes:
        seen: (core index, operand) -> one observation per pass.
    """

    locations = frozenset(OPERANDS)
    layers = None

    def __init__(self, sources: Sources) -> None:
        self.seen: dict[tuple[int, str], list[Observation]] = {}
        self._sources = sources
        self._recorder: OperandRecorder | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Observe one pass."""
        with OperandRecorder(model, self._sources) as self._recorder, tapped(model, self):
            yield
        self._recorder = None

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep copies."""
        if call.number or self._recorder is None:
            return
        record = self._recorder.recorded(call.core).get(location)
        if record is not None:
            seen = Observation(tensor.clone(), record.projected.clone(), record.hidden.clone(), record.rotation)
            self.seen.setdefault((call.core.index, location), []).append(seen)


def _measured(
    core: AttentionCore, operand: str, source: OperandSource, seen: list[Observation], norms: NormReader
) -> OperandSource | str:
    if len(seen) < 3:
        return f"the projection of its {OPERANDS[operand]} does not run inside of it"
    if any(observation.projected.shape != observation.operand.shape for observation in seen):
        return f"its {OPERANDS[operand]} are projected together with those of other calls"
    if seen[0].operand.shape[2] < 2:
        return "the example inputs have one position only, where a rotary embedding does nothing"
    tail = explained_tail(core.module, seen, norms)
    if tail is None:
        return f"its {OPERANDS[operand]} pass through something that was not recognised"
    return replace(source, tail=tail, norm=norms.before(seen[0].hidden) or "its input is not the output of a norm")
