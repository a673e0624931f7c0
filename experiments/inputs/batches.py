"""One batch of token ids: check it, pass it to the model, and compute its fingerprint.

A batch inside the harness is a dict of tensors: ``input_ids`` (B, T) int64, ``attention_mask`` where there is padding,
``labels`` where there is a loss, and any other inputs of the model. Dataloaders of users return many other forms;
``validate_batch`` converts them to this dict or says what is wrong with them.

    batch = validate_batch(next(iter(dataloader)), family="causal", vocab_size=50257)
    outputs = model(**model_inputs(batch, device))

>>> tokens, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
>>> real_positions(validate_batch({"input_ids": tokens, "attention_mask": mask}))
tensor([[False,  True,  True]])
>>> data_fingerprint([{"input_ids": tokens}]) == data_fingerprint([{"input_ids": tokens + 1}])
False
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.errors import UsageError
from experiments.inputs.families import FAMILIES

IGNORED = -100

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_BATCH_FORMS = "a dict of tensors with input_ids, a tensor (B, T), or a tuple or list of that one tensor"


def validate_batch(
    batch: Any, family: str = "causal", vocab_size: int | None = None, max_positions: int | None = None
) -> dict[str, Tensor]:
    """Check a batch of a user's dataloader and return it as a plain dict; tensors keep their device.

    Args:
        batch: A dict or ``BatchEncoding`` with ``input_ids``, a bare tensor (B, T), or a tuple or list of one tensor.
        family: A name of ``FAMILIES``; decides which labels the batch needs.
        vocab_size: Token ids must be below it; None skips this check.
        max_positions: The longest sequence that the model accepts; None for no limit.

    Returns:
        ``input_ids`` int64 (B, T); ``attention_mask`` int64 (B, T) of 0 and 1, or additive float (B or 1, heads or 1,
        T, T); ``labels`` int64 if the batch has them; other tensors unchanged.

    Raises:
        UsageError: A tensor is missing or wrong; the message names its key.
    """
    wanted, tensors = FAMILIES.find(family), _as_dict(batch)
    tokens = _token_ids("input_ids", tensors["input_ids"])
    refuse_unknown_ids("input_ids", tokens, vocab_size)
    if max_positions is not None and tokens.shape[1] > max_positions:
        raise UsageError(f"input_ids: got {tokens.shape[1]} tokens a sequence, allowed {max_positions}")
    checked = tensors | {"input_ids": tokens}
    if "attention_mask" in tensors:
        checked["attention_mask"] = _attention_mask(tensors["attention_mask"], tokens)
    if "decoder_input_ids" in tensors:
        checked["decoder_input_ids"] = _token_ids("decoder_input_ids", tensors["decoder_input_ids"])
        refuse_unknown_ids("decoder_input_ids", checked["decoder_input_ids"], vocab_size)
    if "labels" in tensors:
        positions = checked.get("decoder_input_ids") if wanted.two_stacks else tokens
        checked["labels"] = _labels(tensors["labels"], positions, vocab_size)
    elif wanted.needs_labels:
        raise UsageError(f"labels: missing; a batch of a {family} model must carry them, -100 where there is no target")
    return checked


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return, for every position, the next token if both are real (not padding); a label of -100 removes a target.

    Returns:
        (B, T) int64, ``IGNORED`` where there is no target.
    """
    tokens, labels = batch["input_ids"], batch.get("labels")
    real = real_positions(batch)
    following = (tokens if labels is None else labels)[:, 1:]
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = torch.where(real[:, :-1] & real[:, 1:], following, IGNORED)
    return targets


def given_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of the batch, (B, T) int64."""
    return batch["labels"]


def real_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Return (B, T) bool: True at tokens, False at padding.

    A 2-D ``attention_mask`` says it directly; with a 4-D mask, a position is a token if it may see itself in some head.
    """
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.ndim == 2:
        return mask != 0
    itself = mask.diagonal(dim1=-2, dim2=-1).amax(dim=1)
    return (itself > torch.finfo(mask.dtype).min / 2).expand(tokens.shape)


def model_inputs(batch: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Return the model's arguments: the batch without its labels, on the device."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


def data_fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the BLAKE2b of all batches as 32 hex digits: names, dtypes, shapes and bytes of tokens, masks, labels."""
    digest = hashlib.blake2b(digest_size=16)
    for number, batch in enumerate(batches):
        for name, tensor in sorted(batch.items()):
            digest.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_unknown_ids(name: str, tokens: Tensor, vocab_size: int | None) -> None:
    """Raise ``UsageError`` if a token id is negative or not below ``vocab_size``."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        wrong = lowest if lowest < 0 else highest
        allowed = "0 or more" if vocab_size is None else f"0 .. {vocab_size - 1}, the vocabulary of the model"
        raise UsageError(f"{name}: got the token id {wrong}, allowed {allowed}")


def _as_dict(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    elif isinstance(batch, tuple | list):
        if len(batch) != 1:
            raise UsageError(f"batch: got a {type(batch).__name__} of {len(batch)}, allowed {_BATCH_FORMS}")
        batch = {"input_ids": batch[0]}
    elif not isinstance(batch, Mapping):
        raise UsageError(f"batch: got {type(batch).__name__}, allowed {_BATCH_FORMS}")
    if "input_ids" not in batch:
        raise UsageError(f"batch: got the keys {', '.join(map(repr, batch)) or 'none'}, allowed input_ids and others")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name}: got {type(value).__name__}, allowed a tensor")
    return dict(batch)


def _token_ids(name: str, tokens: Tensor) -> Tensor:
    if tokens.dtype not in _INTEGERS or tokens.ndim != 2:
        raise UsageError(f"{name}: got {_kind(tokens)}, allowed integers of shape (B, T)")
    if tokens.numel() == 0:
        raise UsageError(f"{name}: got an empty batch of shape {tuple(tokens.shape)}, allowed one token or more")
    return tokens.long()


def _attention_mask(mask: Tensor, tokens: Tensor) -> Tensor:
    B, T = tokens.shape
    if mask.ndim == 4:
        if not mask.is_floating_point():
            raise UsageError(
                f"attention_mask: got {_kind(mask)}; eager attention adds a 4-D mask to the logits, so True and False"
                " would add 1 and 0 and mask nothing; convert it: torch.zeros(mask.shape, dtype=model.dtype)"
                ".masked_fill(~mask, torch.finfo(model.dtype).min), or give a 2-D mask of 1 and 0"
            )
        if mask.shape[0] not in (1, B) or mask.shape[2:] != (T, T):
            raise UsageError(f"attention_mask: got {_kind(mask)}, allowed ({B} or 1, heads or 1, {T}, {T})")
        return mask
    if mask.shape != tokens.shape:
        raise UsageError(
            f"attention_mask: got {_kind(mask)}, allowed {tuple(tokens.shape)} as input_ids, or 4-D additive"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UsageError("attention_mask: got values other than 0 and 1, allowed 1 at tokens and 0 at padding")
    if not bool((mask != 0).any(dim=1).all()):
        raise UsageError("attention_mask: got a sequence of nothing but padding, allowed one token or more")
    return mask.long()


def _labels(labels: Tensor, positions: Tensor | None, vocab_size: int | None) -> Tensor:
    shape = labels.shape if positions is None else positions.shape
    if labels.dtype not in _INTEGERS or labels.ndim != 2 or labels.shape != shape:
        raise UsageError(f"labels: got {_kind(labels)}, allowed integers of shape {tuple(shape)}")
    targets = labels[labels != IGNORED]
    if len(targets) == 0:
        raise UsageError("labels: got -100 everywhere, allowed one target or more")
    refuse_unknown_ids("labels", targets, vocab_size)
    return labels.long()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
