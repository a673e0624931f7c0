"""The entry of path A: one function in transformers' attention interface, and the configurations that select it.

transformers chooses an attention function by the name in a configuration object. Registering ours under one name, in
the interface *and* in the mask interface (without which the function would get no mask and the model would silently
become non-causal), lets every architecture that dispatches through the interface be instrumented.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

IMPLEMENTATION = "fault_injection"
"""The name under which the instrumented attention is registered."""

_FIELD = "_attn_implementation_internal"


def register(function: Callable[..., Any]) -> None:
    """Make ``function`` selectable as ``IMPLEMENTATION``, with the masks that eager attention gets."""
    AttentionInterface.register(IMPLEMENTATION, function)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def configurations(modules: Iterable[nn.Module]) -> list[Any]:
    """Return every distinct configuration object (and nested ones) that ``modules`` select their attention by."""
    found: dict[int, Any] = {}
    pending = [getattr(module, "config", None) for module in modules]
    while pending:
        config = pending.pop()
        if config is None or id(config) in found or not hasattr(config, _FIELD):
            continue
        found[id(config)] = config
        pending.extend(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))
    return list(found.values())


_in_use: dict[int, weakref.ref[Any]] = {}


class SelectedImplementation:
    """Selects an attention implementation on configuration objects, and restores the earlier ones.

    The field is set per object: ``set_attn_implementation`` would flatten the choices of nested configurations.

    Raises:
        ValueError: another patched model uses the same configuration object; both would switch together.
    """

    def __init__(self, configs: Iterable[Any]) -> None:
        # A copy of a patched model has a copy of its configuration, which has our name although nobody selected it.
        self._before = [(config, _own_choice(config)) for config in configs]
        for config, _ in self._before:
            holder = _in_use.get(id(config))
            if holder is not None and holder() is config:
                raise ValueError(
                    f"{type(config).__name__}: this configuration object is shared with a model that is patched; "
                    "unpatch that one first, or build one of them from a copy of the config"
                )
        for config, _ in self._before:
            _in_use[id(config)] = weakref.ref(config)

    def select(self, name: str, configs: Iterable[Any] | None = None) -> None:
        """Select ``name`` on ``configs`` (default: all)."""
        for config in self.configs if configs is None else configs:
            setattr(config, _FIELD, name)

    @property
    def configs(self) -> list[Any]:
        """The managed configuration objects."""
        return [config for config, _ in self._before]

    def restore(self) -> None:
        """Restore every object's own choice."""
        for config, name in self._before:
            setattr(config, _FIELD, name)
            _in_use.pop(id(config), None)


def _own_choice(config: Any) -> str | None:
    chosen: str | None = getattr(config, _FIELD)
    return "eager" if chosen == IMPLEMENTATION else chosen
