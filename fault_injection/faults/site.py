"""Sites: the tensors of attention that a fault can hit, as one fault-free pass shows them.

>>> import transformers
>>> from fault_injection import patched, tapped
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 1, 4, 1]])
>>> survey = SiteSurvey(model_dtype=torch.float32)
>>> with patched(model), tapped(model, survey):
...     _ = model(tokens)
>>> site = survey.site(layer=0, location="scores")
>>> site.shape, site.dtype, site.visible[0, 0].int().tolist()
((1, 2, 4, 4), torch.float32, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])

The survey reads from the logits of the fault-free pass which keys a query sees: a hidden key has a logit at or below
half the lowest finite number of the model's dtype, in every architecture's way of masking. Visibility depends only on
the input, so it tells a detector nothing about a fault.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fault_injection.attention.call import AttentionCall
from fault_injection.faults.spec import AXES, ElementIndex
from fault_injection.locations import LOCATION_TABLE


@dataclass(frozen=True)
class Site:
    """One tensor of one attention core.

    Attributes:
        layer, module, location: where the tensor belongs.
        shape: ``(batch, head, row, col)`` of the tensor.
        columns: how many of its columns can be hit (a learned sink's column is no key).
        dtype: its native dtype.
        visible: a boolean tensor broadcastable to ``(batch, head, row, columns)``, ``True`` at elements that take part
            in
            attention: for pairs, keys that the query sees; for keys and values, keys that some query sees; for all
            others, queries that are not padding. ``None`` if every element takes part.
    """

    layer: int
    module: str
    location: str
    shape: tuple[int, int, int, int]
    columns: int
    dtype: torch.dtype
    visible: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """The shape of the part of the tensor that can be hit."""
        return (*self.shape[:3], self.columns)

    def flat(self, index: tuple[int, int, int, int]) -> int:
        """Return the row-major position of ``index`` in the tensor."""
        return int(np.ravel_multi_index(index, self.shape))

    def sees(self, index: tuple[int, int, int, int]) -> bool:
        """Return whether ``index`` is a position that takes part in attention (hidden keys do not)."""
        if self.visible is None:
            return True
        where = tuple(i if n > 1 else 0 for i, n in zip(index, self.visible.shape, strict=True))
        return bool(self.visible[where])

    def draw(
        self, partial: ElementIndex, random: np.random.Generator, *, include_masked: bool
    ) -> tuple[int, int, int, int]:
        """Draw an element uniformly among those that agree with ``partial``.

        Hidden keys are left out unless ``include_masked``. If ``partial`` leaves only hidden keys, one of them is drawn
        (and the caller records it as masked): a requested fault is never dropped.

        Raises:
            IndexError: a coordinate does not exist; the message gives the range.
        """
        self.check(partial)
        if self.visible is not None and not include_masked:
            chosen = self._draw_visible(partial, random)
            if chosen is not None:
                return chosen
        batch, head, row, col = (
            int(random.integers(size)) if given is None else given
            for given, size in zip(partial.as_tuple(), self.extent, strict=True)
        )
        return batch, head, row, col

    def check(self, partial: ElementIndex) -> None:
        """Raise ``IndexError`` with the range for a coordinate that does not exist."""
        for axis, given, size in zip(AXES, partial.as_tuple(), self.extent, strict=True):
            if given is not None and not 0 <= given < size:
                raise IndexError(
                    f"fault.index.{axis}: got {given}, allowed 0..{size - 1} for {self.location} of layer {self.layer}"
                )

    def _draw_visible(self, partial: ElementIndex, random: np.random.Generator) -> tuple[int, int, int, int] | None:
        if self.visible is None:
            return None
        # An axis of size 1 in the mask stands for the whole axis of the tensor: it is drawn separately.
        shared = [mask < size for mask, size in zip(self.visible.shape, self.extent, strict=True)]
        window = tuple(
            slice(None) if given is None or alike else slice(given, given + 1)
            for given, alike in zip(partial.as_tuple(), shared, strict=True)
        )
        visible = self.visible[window]
        ends = torch.cumsum(visible.sum(-1).flatten(), 0)
        if int(ends[-1]) == 0:
            return None
        ticket = int(random.integers(int(ends[-1])))
        line = int(torch.searchsorted(ends, ticket, right=True))
        within = ticket - (int(ends[line - 1]) if line else 0)
        leading = [int(i) for i in np.unravel_index(line, visible.shape[:3])]
        position = [*leading, int(visible[tuple(leading)].nonzero()[within])]
        found: list[int] = []
        for axis, given in enumerate(partial.as_tuple()):
            if given is not None:
                found.append(given)
            elif shared[axis]:
                found.append(int(random.integers(self.extent[axis])))
            else:
                found.append(position[axis])
        return found[0], found[1], found[2], found[3]


class SiteSurvey:
    """A tap that notes the sites of a fault-free pass.

    Args:
        model_dtype: the model's masks contain the lowest number of this dtype.
        layers: the cores to note (default: all).
        real_queries: ``(batch, query)``, ``False`` at padding (default: no padding).

    Attributes:
        visible: by ``(layer, call)``, which keys each query sees, with the column of a learned sink if it has one.
        kv_identical: by ``(layer, call)``, whether the keys are bitwise the values.
        plain_logits: by ``(layer, call)``, whether the visible logits are only the scaled scores (no bias, no soft
            cap), within the rounding of the scaling.
        overwritten: each ``(layer, call)`` in which the architecture changes the scores in place after their product.
    """

    def __init__(
        self,
        model_dtype: torch.dtype,
        layers: Collection[int] | None = None,
        real_queries: Tensor | None = None,
    ) -> None:
        self.layers = None if layers is None else frozenset(layers)
        self.locations = frozenset(LOCATION_TABLE.names())
        self.visible: dict[tuple[int, int], Tensor] = {}
        self.plain_logits: dict[tuple[int, int], bool] = {}
        self._model_dtype = model_dtype
        self._real_queries = real_queries
        self._sites: dict[tuple[int, str], Site] = {}
        self._masks: list[Tensor] = []
        self.overwritten: set[tuple[int, int]] = set()
        self._scores: Tensor | None = None
        self._original: Tensor | None = None
        self._key: Tensor | None = None
        self.kv_identical: dict[tuple[int, int], bool] = {}

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Note the tensor's shape and dtype; from the logits, which keys are visible."""
        key = call.core.index, call.number
        if location == "logits":
            self._note_logits(key, tensor, call.scaling)
        if location == "scores":
            # A copy: some architectures scale the scores in place.
            self._scores = tensor.detach().clone()
            self._original = tensor
        if location == "k":
            self._key = tensor
        if location == "v" and self._key is not None:
            self.kv_identical[key] = torch.equal(self._key, tensor)
            self._key = None
        if call.number == 0:
            batch, head, row, col = tensor.shape
            columns = self._columns(key[0], location, col)
            shape = (batch, head, row, col)
            self._sites[key[0], location] = Site(key[0], call.core.name, location, shape, columns, tensor.dtype)

    def _columns(self, layer: int, location: str, columns: int) -> int:
        """Return how many columns can be hit: a learned sink has a column in logits and weights, but no score."""
        row = LOCATION_TABLE[location]
        behind_scores = row.over_pairs and row.tensor != "scores"
        return min(columns, self._sites[layer, "scores"].columns) if behind_scores else columns

    def _note_logits(self, key: tuple[int, int], logits: Tensor, scaling: float | None) -> None:
        visible = self._shared(visible_keys(logits, self._model_dtype))
        scores, self._scores = self._scores, None
        if self._original is not None and scores is not None and not torch.equal(self._original, scores):
            self.overwritten.add(key)
        self._original = None
        self.visible[key] = visible
        self.plain_logits[key] = (
            scores is not None and scaling is not None and _is_scaled(logits, scores, scaling, visible)
        )

    def _shared(self, mask: Tensor) -> Tensor:
        """Return an equal mask seen before, so that layers with one mask share its memory."""
        for known in self._masks:
            if known.shape == mask.shape and torch.equal(known, mask):
                return known
        self._masks.append(mask)
        return mask

    def sites(self) -> dict[tuple[int, str], Site]:
        """Return every site that was seen, by layer and location."""
        return {key: self.site(*key) for key in self._sites}

    def site(self, layer: int, location: str) -> Site:
        """Return a site; raise ``KeyError`` if the pass did not reach it."""
        site = self._sites[layer, location]
        seen = self.visible[layer, 0][..., : self._sites[layer, "scores"].columns]
        real = self._real(seen)
        if LOCATION_TABLE[location].over_pairs:
            return replace(site, visible=seen if real is None else seen & real)
        if LOCATION_TABLE[location].over_keys:
            # (batch, 1, key, 1): whether any query of any head sees the key.
            part: Tensor | None = (seen if real is None else seen & real).any(-2).any(1)[:, None, :, None]
        else:
            part = real
        return site if part is None or bool(part.all()) else replace(site, visible=part)

    def _real(self, seen: Tensor) -> Tensor | None:
        """Return ``(batch, 1, query, 1)``; ``None`` without padding, or if the queries are other tokens."""
        real = self._real_queries
        if real is None or bool(real.all()) or real.shape[-1] != seen.shape[-2]:
            return None
        return real[:, None, :, None]


def _is_scaled(logits: Tensor, scores: Tensor, scaling: float, visible: Tensor) -> bool:
    if logits.shape != scores.shape:
        return False
    # The product in their own format is within its tolerance; where it explains all, nothing is converted.
    if bool(((logits - scores * scaling == 0) | ~visible).all()):
        return True
    expected = scores.double() * scaling
    rounding = 4 * max(torch.finfo(logits.dtype).eps, torch.finfo(scores.dtype).eps)
    close = (logits.double() - expected).abs() <= rounding * expected.abs() + torch.finfo(scores.dtype).tiny
    return bool((close | ~visible).all())


def visible_keys(logits: Tensor, model_dtype: torch.dtype) -> Tensor:
    """Return which keys each query sees, as a boolean tensor whose head axis is 1 if all heads see the same.

    Args:
        logits: ``(batch, head, query, key)`` of a fault-free pass: the input of the softmax.
        model_dtype: the lowest number of this dtype hides a key.
    """
    lowest = max(torch.finfo(logits.dtype).min, torch.finfo(model_dtype).min)
    visible = ~(logits.detach() <= lowest / 2)
    one_head = visible[:, :1]
    same = bool((visible == one_head).all())
    return one_head.clone() if same else visible
