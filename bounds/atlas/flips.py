"""Every single-bit flip of one attention call, predicted in closed form: no model is run.

    for flips in every_flip(state, gradient, LogitMap(state.scaling)):
        flips.location, flips.bit, flips.loss            # one bit of all elements of one tensor of one head

T20-T25 of docs/theory.md give the change of out, the gradient of the loss turns it into a first-order change of the
loss. For the scores of a head with n keys and d channels this costs O(n^2 (d + bits)): the distances between
values and outputs once, then one closed form per bit.

Public names: ``every_flip``, ``score_flips``, ``flipped``.

>>> flipped(torch.tensor([1.0, -2.0]), 31).tolist()
[-1.0, 2.0]
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from bounds.atlas.statistics import Flips
from bounds.atlas.terms import HeadTerms, head_terms, row_slices
from bounds.core.attention_state import AttentionState
from bounds.effects.fault_effect import LogitMap, score_tilt, softmax_change
from fault_injection.numbers.bits import float_format


def flipped(tensor: Tensor, bit: int) -> Tensor:
    """Return a copy of ``tensor`` with ``bit`` of every element flipped."""
    layout = float_format(tensor.dtype)
    return (tensor.contiguous().view(layout.integer) ^ layout.signed(1 << bit)).view(tensor.dtype)


def every_flip(
    state: AttentionState, gradient: Tensor, logit_map: LogitMap | None, locations: Collection[str] | None = None
) -> Iterator[Flips]:
    """Yield all single-bit flips of an attention call, one bit of one head's tensor at a time.

    Args:
        state: a fault-free call.
        gradient: (B, H, T, D_v), derivative of the loss by ``state.out``.
        logit_map: how scores become logits; None leaves out scores, q and k.
        locations: which to predict, of q, k, v, scores, weights, masked weights, out (default: all).
    """
    group = state.query.shape[1] // state.key.shape[1]
    for batch in range(state.query.shape[0]):
        for shared in range(state.key.shape[1]):
            readers = [head_terms(state, gradient, batch, shared * group + member) for member in range(group)]
            for location, sweep in _SWEEPS.items():
                through_softmax = location in ("scores", "q", "k")
                if locations is not None and location not in locations:
                    continue
                if (through_softmax and logit_map is None) or (location == "scores" and state.scores is None):
                    continue
                known_map = logit_map or LogitMap(1.0)
                for terms in [readers] if location in ("k", "v") else [[reader] for reader in readers]:
                    tensor = _tensor(terms[0], location)
                    for bit in range(float_format(tensor.dtype).width):
                        yield sweep(terms, tensor, bit, known_map)


def score_flips(terms: HeadTerms, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of ``bit`` in the scores of one head."""
    return _scores([terms], _tensor(terms, "scores"), bit, logit_map)


def _tensor(terms: HeadTerms, location: str) -> Tensor:
    state, batch, head = terms.state, terms.batch, terms.head
    if location in ("k", "v"):
        tensor = state.key if location == "k" else state.value
        return tensor[batch, head // (state.query.shape[1] // tensor.shape[1])]
    if location == "scores" and state.scores is not None:
        return state.scores[batch, head]
    if location in ("weights", "masked weights"):
        return state.weights[batch, head, :, : terms.view.keys]
    return (state.query if location == "q" else state.out)[batch, head]


def _scores(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    (terms,) = readers
    view, keys = terms.view, terms.view.keys
    after, scores = flipped(before, bit), view.scores[:, :keys]
    raised, others = logit_map.logit(after.double()), view.others[:, :keys]
    limit = torch.finfo(before.dtype).max
    tilt = score_tilt(view.log_weights[:, :keys], others, logit_map.change(scores, after.double() - scores))
    effect = tilt.abs() * terms.reach
    return Flips(
        "scores",
        bit,
        (terms.batch, terms.head),
        before,
        after,
        effect=effect,
        relative=_in_units_of(effect, terms.length[:, None]),
        noise_ratio=tilt.abs() * terms.reach_noise,
        loss=tilt * terms.pull,
        # -inf removes a key, which is harmless unless it is the only one.
        nonfinite=~(raised <= limit) | ((raised < -limit) & (others == 0)),
        counted=view.visible[:, :keys],
    )


def _weights(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    return _weights_where("weights", readers[0], before, bit, readers[0].view.visible)


def _masked_weights(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    view = readers[0].view
    return _weights_where("masked weights", readers[0], before, bit, ~view.visible & view.visible.any(-1, keepdim=True))


def _weights_where(location: str, terms: HeadTerms, before: Tensor, bit: int, counted: Tensor) -> Flips:
    view, value = terms.view, terms.view.value[: terms.view.keys]
    after = flipped(before, bit)
    cast = after if terms.state.mass is None else after.to(terms.state.mass.dtype)
    added = cast.double() - view.mass
    effect = added.abs() * value.square().sum(-1).sqrt()
    largest = added.abs() * value.abs().amax(-1)
    return Flips(
        location,
        bit,
        (terms.batch, terms.head),
        before,
        after,
        effect=effect,
        relative=_in_units_of(effect, terms.length[:, None]),
        noise_ratio=added.abs() * terms.value_noise,
        loss=added * terms.value_pull,
        nonfinite=~(largest <= torch.finfo(terms.state.out.dtype).max) | ~torch.isfinite(cast),
        counted=counted[:, : view.keys],
    )


def _out(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    (terms,) = readers
    after = flipped(before, bit)
    added = after.double() - before.double()
    return Flips(
        "out",
        bit,
        (terms.batch, terms.head),
        before,
        after,
        effect=added.abs(),
        relative=_in_units_of(added.abs(), terms.length[:, None]),
        noise_ratio=added.abs() / terms.noise,
        loss=added * terms.gradient,
        nonfinite=~torch.isfinite(after),
        counted=terms.rows_seen.expand(before.shape),
    )


def _query(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    (terms,) = readers
    view, state = terms.view, terms.state
    after = flipped(before, bit)
    added = state.score_factor * (after.double() - before.double())
    limit = torch.finfo((state.logits if state.scores is None else state.scores).dtype).max
    effect, relative, noise, loss = torch.empty((4, *before.shape), dtype=torch.float64, device=before.device)
    bad = ~torch.isfinite(after)
    for channels in row_slices(before.shape[1], view.scores.numel()):
        raw = added[:, channels, None] * view.key.mT[None, channels]
        raised = logit_map.logit(_stored(view.scores[:, None] + raw, limit))
        highest = torch.where(view.visible[:, None], raised, -torch.inf).amax(-1)
        exposed = raised.amax(-1) if logit_map.mask_added else highest
        bad[:, channels] |= ~(exposed <= limit) | (highest < -limit)
        change = softmax_change(
            view.log_weights[:, None],
            view.weights[:, None],
            view.top[:, None],
            logit_map.change(view.scores[:, None], raw),
        )
        moved = change @ view.value
        effect[:, channels] = moved.square().sum(-1).sqrt()
        relative[:, channels] = _in_units_of(effect[:, channels], terms.length[:, None])
        noise[:, channels] = (moved.abs() / terms.noise[:, None]).amax(-1)
        loss[:, channels] = (moved @ terms.gradient[..., None])[..., 0]
    counted = terms.rows_seen.expand(before.shape)
    return Flips("q", bit, (terms.batch, terms.head), before, after, effect, relative, noise, loss, bad, counted)


def _key(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    state, keys = readers[0].state, before.shape[0]
    after = flipped(before, bit)
    added = state.score_factor * (after.double() - before.double()).mT
    limit = torch.finfo((state.logits if state.scores is None else state.scores).dtype).max
    # (channels, keys) here: a channel of all keys is a row of scores.
    squares, relative, noise, loss = torch.zeros((4, *added.shape), dtype=torch.float64, device=before.device)
    bad = ~torch.isfinite(after).mT
    for terms in readers:
        view = terms.view
        scores = view.scores[:, None, :keys]
        exposed = (view.visible | logit_map.mask_added)[:, None, :keys] & terms.rows_seen[:, None]
        for channels in row_slices(added.shape[0], view.mass.numel()):
            raw = view.query[:, channels, None] * added[None, channels]
            tilt = score_tilt(
                view.log_weights[:, None, :keys], view.others[:, None, :keys], logit_map.change(scores, raw)
            )
            moved = tilt.abs() * terms.reach[:, None]
            squares[channels] += moved.square().sum(0)
            share = _in_units_of(moved, terms.length[:, None, None]).amax(0)
            relative[channels] = torch.maximum(relative[channels], share)
            noise[channels] = torch.maximum(noise[channels], (tilt.abs() * terms.reach_noise[:, None]).amax(0))
            loss[channels] += (tilt * terms.pull[:, None]).sum(0)
            bad[channels] |= (exposed & ~(logit_map.logit(_stored(scores + raw, limit)) <= limit)).any(0)
    origin, counted = _shared_by(readers, before)
    effect, relative, noise, loss = (part.mT for part in (squares.sqrt(), relative, noise, loss))
    return Flips("k", bit, origin, before, after, effect, relative, noise, loss, bad.mT, counted)


def _value(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    after = flipped(before, bit)
    added = after.double() - before.double()
    size = added.abs()
    masses = torch.stack([terms.view.mass.abs() for terms in readers])
    lengths = torch.stack([terms.length for terms in readers])
    noise = torch.stack([terms.mass_noise for terms in readers]).amax(0)
    pull = torch.stack([terms.mass_pull for terms in readers]).sum(0)
    share = _in_units_of(masses, lengths[..., None]).amax((0, 1))[:, None]
    origin, counted = _shared_by(readers, before)
    return Flips(
        "v",
        bit,
        origin,
        before,
        after,
        effect=size * masses.square().sum((0, 1)).sqrt()[:, None],
        relative=torch.where(size == 0, 0.0, size * share),
        noise_ratio=size * noise,
        loss=added * pull,
        nonfinite=~(size * masses.amax((0, 1))[:, None] <= torch.finfo(readers[0].state.out.dtype).max),
        counted=counted,
    )


def _shared_by(readers: list[HeadTerms], before: Tensor) -> tuple[tuple[int, int], Tensor]:
    """Return batch and key/value head of a group, and which of its keys some query sees."""
    first = readers[0]
    seen = torch.stack([terms.view.visible.any(0) for terms in readers]).any(0)
    origin = first.batch, first.head // len(readers)
    return origin, seen[: before.shape[0], None].expand(before.shape)


def _stored(scores: Tensor, limit: float) -> Tensor:
    """Return the scores as a format whose largest number is ``limit`` holds them: what is beyond it overflows."""
    return torch.where(scores.abs() > limit, scores.sign() * torch.inf, scores)


def _in_units_of(effect: Tensor, length: Tensor) -> Tensor:
    # A row of zeros that nothing moves has not changed; any change of it is infinitely large.
    return torch.where(effect == 0, 0.0, effect / length)


_SWEEPS = {
    "q": _query,
    "k": _key,
    "v": _value,
    "scores": _scores,
    "weights": _weights,
    "masked weights": _masked_weights,
    "out": _out,
}
