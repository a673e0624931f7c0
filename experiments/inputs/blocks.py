"""The blocks of a model: a chain in which each block reads the output of the block before.

chain = block_chain(model, cores)              # Chain, or the reason why the blocks form no chain
with chain.replaced(lambda number, block, hidden, args, kwargs: ...):
model(**batch)                             # the model's own code around the blocks, ours inside them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fault_injection import AttentionCore

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Replacement = Callable[[int, Tensor, Arguments], Any]
"""A function that is called with the number of the block, its hidden state, and its arguments (with hidden state)."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The blocks of a model in order.

    Attributes:
        blocks: the modules.
        block_of: for each attention layer, the number of its block.
    """

    blocks: tuple[nn.Module, ...]
    block_of: Mapping[int, int]

    @contextmanager
    def replaced(self, replacement: Replacement) -> Iterator[None]:
        """Replace the forward of every block by ``replacement``, until the ``with`` block ends."""
        own = [block.__dict__.get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.__dict__["forward"] = _stand_in(number, replacement)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.__dict__["forward"]
                if forward is not None:
                    block.__dict__["forward"] = forward


def _stand_in(number: int, replacement: Replacement) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(number, _given_hidden(args, kwargs), (args, kwargs))

    return forward


def _given_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    if not isinstance(hidden, Tensor):
        raise TypeError(f"a block was given {type(hidden).__name__} for its hidden state, allowed Tensor")
    return hidden


def with_hidden(hidden: Tensor, arguments: Arguments) -> Arguments:
    """Return the arguments of a block with another hidden state."""
    args, kwargs = arguments
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in a block's output: the tensor itself, or the first element of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise TypeError(f"a block returned {type(output).__name__}, allowed a tensor or a tuple that begins with one")
    return hidden


def block_chain(model: nn.Module, cores: Sequence[AttentionCore]) -> Chain | str:
    """Return the chain of blocks that contain a model's attention cores, or the reason why they form no chain.

    The blocks are the members of the outermost ``ModuleList`` around the cores. This function does not check that they
    really follow each other; a recorded pass does (``experiments.engine.fast.recording``).
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    around = {_outermost(core.name, lists) for core in cores}
    if len(around) != 1 or None in around:
        return "its attention modules do not lie in one list of blocks"
    (name,) = around
    blocks = tuple(lists[str(name)])
    block_of = {core.index: int(core.name.removeprefix(f"{name}.").split(".")[0]) for core in cores}
    numbers = [block_of[core.index] for core in cores]
    if len(set(numbers)) != len(numbers) or numbers != sorted(numbers):
        return "a block holds several attention modules, or they do not run in the order of the blocks"
    return Chain(blocks, block_of)


def _outermost(name: str, lists: Mapping[str, nn.ModuleList]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in lists), None)
