"""The input of a campaign: windows of exactly ``seq_len`` tokens, drawn by the seed, in batches.

The documents are tokenised, joined with an end-of-text token between them, and cut into windows without overlap or
padding. Then ``num_samples`` windows are drawn without replacement. So two seeds read different text, and one seed
reads the same text for every batch size.

    batches = make_batches(config.data, loaded.tokenizer, config.seed, loaded.family, loaded.facts.vocab_size)

>>> pack_windows(torch.arange(10, 17), 4, prefix=[1])
tensor([[ 1, 10, 11, 12],
        [ 1, 13, 14, 15]])
>>> sorted(draw_windows(available=3, wanted=3, seed=0))
[0, 1, 2]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.config.source_names import SOURCES, parse_source
from experiments.errors import TooFewWindowsError, UsageError
from experiments.inputs.batches import (
    IGNORED,
    data_fingerprint,
    model_inputs,
    real_positions,
    refuse_unknown_ids,
    validate_batch,
)
from experiments.inputs.families import FAMILIES
from experiments.inputs.sources import read_documents
from experiments.registry import loaded

if TYPE_CHECKING:
    from experiments.config import DataConfig

__all__ = [
    "IGNORED",
    "MASKED_SHARE",
    "data_fingerprint",
    "draw_windows",
    "make_batches",
    "make_calibration_batches",
    "model_inputs",
    "pack_windows",
    "real_positions",
    "validate_batch",
]

MASKED_SHARE = 0.15


def make_batches(
    data: DataConfig, tokenizer: Any | None, seed: int, family: str, vocab_size: int
) -> list[dict[str, Tensor]]:
    """Read the source and return the batches of a campaign, on the CPU.

    Every window begins and ends with the special tokens that the tokenizer puts around a text ([CLS] and [SEP] of BERT,
    the first token of Llama); for a causal model, only begins. A masked model's windows have 15 % of their tokens
    replaced by the mask token, chosen by seed and window, with the tokens themselves as labels there.

    Args:
        data: The section ``data`` of the configuration.
        tokenizer: Of the model; None is enough for ``synthetic``.
        seed: Determines which windows are drawn, in which order, and which tokens are masked.
        family: A name of ``FAMILIES``.
        vocab_size: Token ids are below it.

    Returns:
        ``num_samples / batch_size`` dicts of ``input_ids`` and, except for an encoder, ``labels``, both (B, T) int64; a
        label of -100 means no target.

    Raises:
        UsageError: Too little text, a batch size that does not divide the number of samples, ids beyond the vocabulary.
        MissingResourceError: The source does not exist.
    """
    _check_sizes(data, family)
    drawn = SOURCES[parse_source(data.source).kind].windows
    if drawn:
        numbers, windows = list(range(data.num_samples)), loaded(drawn)(data, tokenizer, seed, vocab_size)
    else:
        every = _text_windows(data, tokenizer, family)
        numbers = draw_windows(len(every), data.num_samples, seed)
        windows = every[numbers]
    refuse_unknown_ids("data.source", windows, vocab_size)
    parts = loaded(FAMILIES.find(family).inputs)(windows, numbers, tokenizer, seed)
    starts = range(0, data.num_samples, data.batch_size)
    return [{name: part[start : start + data.batch_size] for name, part in parts.items()} for start in starts]


def make_calibration_batches(
    data: DataConfig, tokenizer: Any | None, seed: int, family: str, vocab_size: int
) -> list[dict[str, Tensor]]:
    """Return as many batches as ``make_batches``, from windows that it does not draw; no batch if these are too few.

    The arguments are those of ``make_batches``.
    """
    both = replace(data, num_samples=2 * data.num_samples)
    try:
        every = make_batches(both, tokenizer, seed, family, vocab_size)
    except TooFewWindowsError:
        return []
    return every[data.num_samples // data.batch_size :]


def pack_windows(tokens: Tensor, seq_len: int, prefix: Sequence[int] = (), suffix: Sequence[int] = ()) -> Tensor:
    """Cut a stream of tokens into windows without overlap; drop the rest at the end.

    Args:
        tokens: (N,) int64.
        seq_len: Length of a window, prefix and suffix included.
        prefix: Tokens at the beginning of every window.
        suffix: Tokens at its end.

    Returns:
        (N // (seq_len - len(prefix) - len(suffix)), seq_len) int64.
    """
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise UsageError(f"data.seq_len: got {seq_len}, allowed {seq_len - body + 1} or more, for its special tokens")
    count = len(tokens) // body
    edges = [torch.tensor(edge, dtype=torch.int64).expand(count, -1) for edge in (list(prefix), list(suffix))]
    return torch.cat([edges[0], tokens[: count * body].view(count, body), edges[1]], dim=1)


def draw_windows(available: int, wanted: int, seed: int) -> list[int]:
    """Draw ``wanted`` different window numbers from ``0 .. available - 1``, in random order."""
    return torch.randperm(available, generator=_generator("windows", seed))[:wanted].tolist()


def _check_sizes(data: DataConfig, family: str) -> None:
    for name in ("num_samples", "seq_len", "batch_size"):
        if getattr(data, name) < 1:
            raise UsageError(f"data.{name}: got {getattr(data, name)}, allowed 1 or more")
    shortest = FAMILIES.find(family).shortest
    if data.seq_len < shortest:
        raise UsageError(f"data.seq_len: got {data.seq_len}, allowed {shortest} or more for a {family} model")
    if data.num_samples % data.batch_size:
        raise UsageError(
            f"data.batch_size: got {data.batch_size}, allowed a divisor of data.num_samples ({data.num_samples})"
        )


def _text_windows(data: DataConfig, tokenizer: Any | None, family: str) -> Tensor:
    if tokenizer is None:
        raise UsageError(f"data.source: got {data.source!r}, but the model has no tokenizer; allowed synthetic")
    tokens = _tokenise(read_documents(data.source, data.field, data.split), tokenizer)
    prefix, suffix = _special_edges(tokenizer)
    windows = pack_windows(tokens, data.seq_len, prefix, suffix if FAMILIES.find(family).closes else ())
    if len(windows) == 0:
        raise UsageError(f"data.source: {data.source!r} has {len(tokens)} tokens, a window needs {data.seq_len}")
    if len(windows) < data.num_samples:
        raise TooFewWindowsError(
            f"data.num_samples: got {data.num_samples}, but {data.source!r} has {len(windows)} windows of"
            f" {data.seq_len} tokens ({len(tokens)} tokens)"
        )
    return windows


Tensors = dict[str, Tensor]


def tokens_alone(windows: Tensor, numbers: Sequence[int], tokenizer: Any | None, seed: int) -> Tensors:
    """Return windows without labels."""
    return {"input_ids": windows}


def tokens_and_labels(windows: Tensor, numbers: Sequence[int], tokenizer: Any | None, seed: int) -> Tensors:
    """Return windows with the tokens themselves as labels."""
    return {"input_ids": windows, "labels": windows.clone()}


def masked_tokens_and_labels(windows: Tensor, numbers: Sequence[int], tokenizer: Any | None, seed: int) -> Tensors:
    """Return windows in which some tokens are hidden behind the mask token, with labels there.

    Args:
        windows: (N, T), changed in place.
        numbers: The numbers of the windows in their source; with the seed they decide which tokens are hidden.
        tokenizer: The tokenizer; it has the mask token.
        seed: The seed of the campaign.
    """
    labels = windows.clone()
    for row, number in enumerate(numbers):
        _mask_tokens(windows[row], labels[row], tokenizer, seed, number)
    return {"input_ids": windows, "labels": labels}


def _tokenise(documents: Sequence[str], tokenizer: Any) -> Tensor:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    between = [] if end is None else [end]
    stream: list[int] = []
    for number, document in enumerate(documents):
        stream.extend(between if number else [])
        stream.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(stream, dtype=torch.int64)


def _special_edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer itself puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def synthetic_windows(data: DataConfig, tokenizer: Any | None, seed: int, vocab_size: int) -> Tensor:
    """Return ``data.num_samples`` windows of uniformly drawn token ids, without special tokens."""
    known = vocab_size if tokenizer is None else min(vocab_size, len(tokenizer))
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(known) if token not in special], dtype=torch.int64)
    if len(ordinary) < 2:
        raise UsageError(f"data.source: got 'synthetic', but only {len(ordinary)} of {known} token ids are not special")
    drawn = torch.randint(len(ordinary), (data.num_samples, data.seq_len), generator=_generator("synthetic", seed))
    return ordinary[drawn]


def _mask_tokens(tokens: Tensor, labels: Tensor, tokenizer: Any | None, seed: int, window: int) -> None:
    """Replace, in place, the chosen tokens by the mask token, and all labels but theirs by -100."""
    mask_token = getattr(tokenizer, "mask_token_id", None)
    if tokenizer is None or mask_token is None:
        raise UsageError(
            "model.path: the tokenizer of this masked model has no mask token, so there is nothing to predict"
        )
    ordinary = (~torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))).nonzero().flatten()
    if len(ordinary) == 0:
        raise UsageError(f"data.seq_len: window {window} holds nothing but special tokens, so nothing can be masked")
    order = torch.randperm(len(ordinary), generator=_generator("mask", seed, window))
    chosen = ordinary[order[: max(1, round(MASKED_SHARE * len(ordinary)))]]
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[chosen] = True
    tokens[hidden] = mask_token
    labels[~hidden] = IGNORED


def _generator(purpose: str, *identity: int) -> torch.Generator:
    # hashed, so that neighbouring seeds and the several uses of one seed have nothing in common
    digest = hashlib.blake2b(repr((purpose, *identity)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
