"""Find out which features of which linear module arrive at the operands of an attention product.

Every linear module of a model is made to put out a code instead of its result: a number for every output feature.
The numbers that arrive at position 0 of queries, keys and values, where rotary embeddings are the identity, tell
which features made them, however the architecture lays them out.

    code = SparseCode(linear_modules)
    reader = CodeReader(code)
    with instrumented(model, inputs), evaluation_mode(model), unscaled_rotations(model):
        for digit in range(code.digits):
            with reader.hooked(digit), tapped(model, reader):
                model(**inputs)
    code.projection(reader.numbers[0, "k"].flatten().tolist())      # Projection, or None if the code was altered
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fault_injection.attention.call import AttentionCall
from fault_injection.attention.instrument import Instrumentation, forget, is_patched


@dataclass(frozen=True, eq=False)
class Projection:
    """Some output features of a linear module.

    Attributes:
        module: ``nn.Linear``, or transformers' ``Conv1D``, which stores the transpose.
        rows: int64, the output features in the order (head, channel) of the attention.
    """

    module: nn.Module
    rows: Tensor

    def weight(self) -> Tensor:
        """Return a copy of the weight, (features, inputs), in the module's dtype."""
        return self._matrix()[self.rows]

    def bias(self) -> Tensor | None:
        """Return a copy of the bias, (features,), or ``None`` if the module has none."""
        bias = self._vector()
        return None if bias is None else bias[self.rows]

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Overwrite the weight and the bias in place; without ``bias``, the module's own becomes zero if it has one."""
        self._matrix()[self.rows] = weight.to(self._matrix())
        own = self._vector()
        if own is not None:
            own[self.rows] = torch.zeros_like(own[self.rows]) if bias is None else bias.to(own)

    def _matrix(self) -> Tensor:
        weight = cast(Tensor, self.module.weight).detach()
        return weight.t() if isinstance(self.module, Conv1D) else weight

    def _vector(self) -> Tensor | None:
        bias = cast("Tensor | None", self.module.bias)
        return None if bias is None else bias.detach()


class SparseCode:
    """A distinct number for every output feature of some linear modules, drawn from far more numbers than features.

    A number goes through the model digit by digit, one forward pass each. Digit d is the value (d + 1) / 256, which
    bfloat16 and float16 hold exactly and which no clipping of projections in use reaches. Arithmetic on the way gives
    numbers that are not in the table: each of them would be there by chance with a probability of at most 1 / 128.
    """

    base = 128

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: dict[nn.Module, tuple[int, int]] = {}
        total = 0
        for module in modules:
            # Linear says out_features, Conv1D nf.
            features = int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]
            self._places[module] = total, features
            total += features
        self.digits = 1
        while self.base**self.digits < self.base * total:
            self.digits += 1
        numbers = _distinct(total, self.base**self.digits)
        self._numbers = torch.from_numpy(numbers)
        # Looked up in the order of their size.
        self._rows = np.argsort(numbers)
        self._table = numbers[self._rows].astype(np.float64)

    def modules(self) -> Iterable[nn.Module]:
        """Return the modules that have a code."""
        return self._places

    def features(self, module: nn.Module) -> int:
        """Return how many output features ``module`` has."""
        return self._places[module][1]

    def values(self, module: nn.Module, digit: int) -> Tensor:
        """Return what ``module`` is to put out, float32, (features,)."""
        start, features = self._places[module]
        numbers = self._numbers[start : start + features]
        return ((numbers // self.base**digit) % self.base + 1) / (2 * self.base)

    def weighted_digit(self, reading: Tensor, digit: int) -> Tensor:
        """Return what ``reading`` contributes to the number, float64; the sum over digits is looked up."""
        return (reading.double().cpu() * (2 * self.base) - 1) * self.base**digit

    def projection(self, numbers: Sequence[float]) -> Projection | None:
        """Return the features with these numbers if all exist, are distinct and belong to one module."""
        wanted = np.asarray(numbers, np.float64)
        if not len(wanted) or not len(self._table):
            return None
        places = np.searchsorted(self._table, wanted).clip(max=len(self._table) - 1)
        rows = self._rows[places]
        if (self._table[places] != wanted).any() or len(np.unique(rows)) != len(rows):
            return None
        for module, (start, features) in self._places.items():
            if start <= rows[0] < start + features:
                inside = ((rows >= start) & (rows < start + features)).all()
                return Projection(module, torch.from_numpy(rows - start)) if inside else None
        return None


def _distinct(count: int, below: int) -> NDArray[np.int64]:
    """Return distinct random numbers, the same ones at every call."""
    random = np.random.Generator(np.random.Philox(key=0))
    found = np.empty(0, np.int64)
    while len(found) < count:
        found = np.concatenate([found, random.integers(below, size=count + 16)])
        _, first = np.unique(found, return_index=True)
        found = found[np.sort(first)]
    return found[:count]


class CodeReader:
    """Puts the code in, and as a tap reads what arrives at position 0 of the operands.

    Args:
        code: the code.
        locations: the operands to read, of "q", "k" and "v".

    Attributes:
        numbers: (core index, operand) -> float64, (head, channel); not in the code's table where it was altered.
        sources: linear module -> the first and the last vector that it was given.
        keys_of: core index -> index of the core at which the same key tensor was first seen.
    """

    layers = None

    def __init__(self, code: SparseCode, locations: AbstractSet[str] = frozenset({"k", "v"})) -> None:
        self.code = code
        self.locations = locations
        self.numbers: dict[tuple[int, str], Tensor] = {}
        self.sources: dict[nn.Module, Tensor] = {}
        self.keys_of: dict[int, int] = {}
        self._digit = 0
        self._keys: dict[int, Tensor] = {}

    @contextmanager
    def hooked(self, digit: int) -> Iterator[None]:
        """Let every module put out one digit of its code, for one forward pass."""
        self._digit = digit
        handles = [module.register_forward_hook(self._hook, with_kwargs=True) for module in self.code.modules()]
        try:
            yield
        finally:
            self._keys.clear()
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        source = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if source is None or not isinstance(output, Tensor) or output.shape[-1] != self.code.features(module):
            return None
        if module not in self.sources:
            vectors = source.reshape(-1, source.shape[-1])
            self.sources[module] = torch.stack([vectors[0], vectors[-1]])
        return self.code.values(module, self._digit).to(output).expand(output.shape).clone()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Read ``tensor``, (batch, head, key, channel), in the first call of a core."""
        index = call.core.index
        if call.number:
            return
        if location == "k":
            # Two tensors that are alive at once have one address only if they are one.
            same = (i for i, keys in self._keys.items() if keys.data_ptr() == tensor.data_ptr())
            self.keys_of.setdefault(index, next(same, index))
            self._keys[index] = tensor
        reading = self.code.weighted_digit(tensor[0, :, 0], self._digit)
        self.numbers[index, location] = self.numbers.get((index, location), 0) + reading


@contextmanager
def instrumented(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Instrument ``model`` for the block unless it already is."""
    if is_patched(model):
        yield
        return
    Instrumentation(model, inputs)
    try:
        yield
    finally:
        forget(model)


@contextmanager
def unscaled_rotations(model: nn.Module) -> Iterator[None]:
    """Set the factor of rotary embeddings for long contexts to 1: at position 0 they are the identity then."""
    scaled = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("attention_scaling") and isinstance(value, float)
    ]
    try:
        for module, name, _ in scaled:
            setattr(module, name, 1.0)
        yield
    finally:
        for module, name, value in scaled:
            setattr(module, name, value)
