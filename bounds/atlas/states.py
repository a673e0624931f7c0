"""What an atlas reads of a model: the attention calls of one pass, the gradient at their outputs, their logit maps.

    with patched(model):
        for call in observe(model, {"input_ids": ids}):
            call.state, call.gradient, call.logit_map

One forward and one backward pass give states and gradients. A third pass, with large numbers added to every score,
shows how scores become logits: what does not change with them is a bias, which has no part in any effect, and a hidden
key whose logit does not change is overwritten by the mask.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bounds.core.attention_state import AttentionState
from bounds.effects.head_view import LogitMap
from fault_injection import OBSERVED, AttentionCall, attention_cores, tapped
from fault_injection.attention.call_tensors import CallTensors
from fault_injection.faults.site import visible_keys

_CAPS = ("attn_logit_softcapping", "attention_logit_cap", "attn_logit_softcap")


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """One attention call of a fault-free pass.

    Attributes:
        state: its tensors.
        gradient: (B, H, T, D_v), derivative of the loss by ``state.out``.
        logit_map: how its scores become logits; None where neither a factor nor a known soft cap explains it.
    """

    state: AttentionState
    gradient: Tensor
    logit_map: LogitMap | None


@dataclass
class _Seen:
    call: AttentionCall
    tensors: dict[str, Tensor]
    leaf: Tensor


@dataclass
class _Observer:
    """Keeps the tensors of the first evaluation of each core, and adds a zero to its output that has a gradient."""

    layers: AbstractSet[int] | None
    seen: dict[int, _Seen] = field(default_factory=dict)
    kept: CallTensors = field(default_factory=CallTensors)

    locations = frozenset(OBSERVED)

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> Tensor | None:
        if call.number > 0:
            return None
        # A copy of the scores: some architectures scale them in place.
        self.kept.keep(call, location, tensor.detach().clone() if location == "scores" else tensor.detach())
        if location != "out":
            return None
        leaf = torch.zeros_like(tensor, requires_grad=True)
        self.seen[call.core.index] = _Seen(call, self.kept.take(call), leaf)
        return tensor + leaf


@dataclass
class _ScoreShaker:
    """Adds large numbers to the scores, makes hidden ones huge, and keeps what goes in and what the softmax gets."""

    layers: AbstractSet[int] | None
    visible: Mapping[int, Tensor]
    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: CallTensors = field(default_factory=CallTensors)

    locations = frozenset({"scores", "logits"})

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> Tensor | None:
        if call.number > 0:
            return None
        if location == "scores":
            generator = torch.Generator().manual_seed(call.core.index)
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            hidden = ~self.visible[call.core.index][..., : tensor.shape[-1]]
            size = min(4 + 4 * float(tensor.detach().abs().amax()), torch.finfo(tensor.dtype).max / 16)
            shaken = (tensor.detach() + size * (2 * noise - 1)).to(tensor.dtype)
            shaken = torch.where(hidden, torch.finfo(tensor.dtype).max / 4, shaken)
            self.kept.keep(call, "shaken", shaken.clone())
            return shaken
        self.pairs[call.core.index] = self.kept.take(call)["shaken"], tensor.detach()
        return None


def observe(model: nn.Module, inputs: Mapping[str, Any], layers: Collection[int] | None = None) -> list[ObservedCall]:
    """Run a patched causal language model on one batch and return its attention calls, in the order of layers.

    Args:
        model: a Hugging Face model that is patched (``fault_injection.patched``) and in evaluation mode.
        inputs: keyword arguments of one forward pass, with ``input_ids`` (B, T); the loss is that of the next token.
        layers: numbers of the attention cores (default: all).

    Raises:
        ValueError: a layer that does not exist, fewer than two tokens, no ``input_ids``, or outputs without logits.
    """
    cores = attention_cores(model)
    for layer in layers or ():
        if not 0 <= layer < len(cores):
            raise ValueError(f"layer: got {layer}, allowed 0..{len(cores) - 1}")
    chosen = None if layers is None else frozenset(layers)
    observer, dtype = _Observer(chosen), next(model.parameters()).dtype
    with torch.enable_grad(), tapped(model, observer):
        loss = _next_token_loss(model, inputs)
        seen = [observer.seen[layer] for layer in sorted(observer.seen)]
        gradients = torch.autograd.grad(loss, [entry.leaf for entry in seen])
    visible = {layer: visible_keys(entry.tensors["logits"], dtype) for layer, entry in observer.seen.items()}
    shaker = _ScoreShaker(chosen, visible)
    with torch.no_grad(), tapped(model, shaker):
        model(**inputs)
    caps = _stated_caps(model)
    return [
        _observed(entry, gradient, visible[layer], caps, shaker.pairs[layer])
        for (layer, entry), gradient in zip(sorted(observer.seen.items()), gradients, strict=True)
    ]


def _next_token_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[-1] < 2:
        raise ValueError("inputs: input_ids of at least two tokens are needed, for the loss of the next token")
    logits = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise ValueError(f"{type(model).__name__}: its output has no logits; allowed: causal language models")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def _stated_caps(model: nn.Module) -> list[float]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = (getattr(text, name, None) for name in _CAPS)
    return [float(cap) for cap in stated if cap]


def _observed(
    entry: _Seen, gradient: Tensor, visible: Tensor, caps: list[float], shaken: tuple[Tensor, Tensor]
) -> ObservedCall:
    call, kept = entry.call, entry.tensors
    scaling = kept["q"].shape[-1] ** -0.5 if call.scaling is None else call.scaling
    slope, keys = scaling / call.product.factor, kept["scores"].shape[-1]
    pairs = (kept["scores"], kept["logits"]), shaken
    added = _mask_is_added(kept["logits"], shaken[1], visible)
    candidates = [LogitMap(slope, cap, added) for cap in (None, *caps)]
    found = [candidate for candidate in candidates if _explains(candidate, pairs, visible[..., :keys])]
    plain = bool(found) and found[0].cap is None and _is_plain(found[0], *pairs[0], visible[..., :keys])
    state = AttentionState(
        query=kept["q"],
        key=kept["k"],
        value=kept["v"],
        logits=kept["logits"],
        weights=kept["weights"],
        out=kept["out"],
        scaling=scaling,
        kv_equal=False,
        has_bias_or_cap=not plain if found else None,
        scores=kept["scores"],
        score_factor=call.product.factor,
        score_addend=call.product.addend,
        mass=kept["mass"],
        visible=visible,
        layer=call.core.index,
        name=call.core.name,
    )
    return ObservedCall(state, gradient.detach(), found[0] if found else None)


def _mask_is_added(logits: Tensor, shaken: Tensor, visible: Tensor) -> bool:
    """Whether huge scores of hidden keys move their logits; a mask that overwrites them does not let them through."""
    return bool(((logits != shaken) & ~visible).any())


def _explains(candidate: LogitMap, pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], visible: Tensor) -> bool:
    """Whether what ``candidate`` leaves unexplained is the same in both passes, up to a constant of each row."""
    before, allowed_before = _rest(candidate, *pairs[0], visible)
    after, allowed_after = _rest(candidate, *pairs[1], visible)
    change = torch.where(visible, after - before, torch.nan)
    allowed = (allowed_before + allowed_after).amax(-1, keepdim=True)
    agrees = (change - change.nanmean(-1, keepdim=True)).abs() <= allowed
    return bool((agrees | ~visible).all())


def _is_plain(candidate: LogitMap, scores: Tensor, logits: Tensor, visible: Tensor) -> bool:
    rest, allowed = _rest(candidate, scores, logits, visible)
    return bool(((rest.abs() <= allowed) | ~visible).all())


def _rest(candidate: LogitMap, scores: Tensor, logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits without what ``candidate`` explains of them, and the rounding this difference may have."""
    # A sink's column has no score. Eight roundings cover scaling, cap and bias in the coarser of the two formats.
    seen, scaled = logits[..., : scores.shape[-1]].double(), candidate.slope * scores.double()
    precision = max(torch.finfo(scores.dtype).eps, torch.finfo(logits.dtype).eps)
    size = torch.where(visible, scaled.abs() + seen.abs(), 0.0)
    return seen - candidate.logit(scores.double()), 8 * precision * size + torch.finfo(scores.dtype).tiny
