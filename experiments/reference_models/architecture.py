"""What the two reference models are: a small byte-level GPT-2, and the same with keys equal to values.

A model reads bytes as ``ByT5Tokenizer`` numbers them (byte + 3, 1 ends a document), so it needs no vocabulary file.
With ``key_value_shared`` every layer has W_K = W_V and b_K = b_V while it is trained, not merely afterwards: the
fused projection of GPT-2 is built from the query and key columns alone, the key columns standing twice.

>>> from transformers import GPT2Config
>>> model = build_reference(GPT2Config(n_layer=1, n_embd=8, n_head=2), key_value_shared=True, seed=0)
>>> key, value = key_value_columns(finish_reference(model).transformer.h[0].attn.c_attn.weight)
>>> key.shape, torch.equal(key, value)
(torch.Size([8, 8]), True)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_DOCUMENT = 1
FIRST_BYTE = 3
VOCABULARY = 384

REFERENCE_CONFIG = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=256,
    n_embd=128,
    n_layer=4,
    n_head=4,
    # the same function as GPT-2's gelu_new, in one kernel
    activation_function="gelu_pytorch_tanh",
    bos_token_id=END_OF_DOCUMENT,
    eos_token_id=END_OF_DOCUMENT,
    pad_token_id=0,
)


class SharedKeyValue(nn.Module):
    """Parametrisation of a fused (query, key, value) projection whose value columns are its key columns."""

    def forward(self, query_key: Tensor) -> Tensor:
        """Return (..., 3E) from the free columns (..., 2E)."""
        query, key = query_key.chunk(2, dim=-1)
        return torch.cat([query, key, key], dim=-1)

    def right_inverse(self, fused: Tensor) -> Tensor:
        """Return the free columns (..., 2E) of a fused projection (..., 3E); its value columns are forgotten."""
        return fused[..., : 2 * fused.shape[-1] // 3].clone()


def build_reference(config: GPT2Config, *, key_value_shared: bool, seed: int) -> GPT2LMHeadModel:
    """Return a freshly initialised float32 model in training mode; equal arguments give bitwise equal weights.

    Args:
        config: The architecture, left as it is; the model gets a copy without dropout.
        key_value_shared: Whether keys and values come from one projection in every layer.
        seed: Of the initial weights; the global generator is left as it was.
    """
    config = copy.deepcopy(config)
    config.embd_pdrop = config.resid_pdrop = config.attn_pdrop = 0.0
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    if key_value_shared:
        for block in model.transformer.h:
            for name in ("weight", "bias"):
                parametrize.register_parametrization(block.attn.c_attn, name, SharedKeyValue())
    return model.train()


def finish_reference(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Turn a trained model, in place, into a plain GPT-2 without parametrisations, in evaluation mode."""
    for module in list(model.modules()):
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model.eval()


def key_value_columns(fused: Tensor) -> tuple[Tensor, Tensor]:
    """Return the key and the value columns, each (..., E), of GPT-2's fused weight (E, 3E) or bias (3E,)."""
    _, key, value = fused.chunk(3, dim=-1)
    return key, value


def encode_documents(documents: Iterable[str]) -> Tensor:
    """Return one int64 tensor (N,) of all documents as ``ByT5Tokenizer`` encodes them, an end after each.

    >>> encode_documents(["a", "é"])
    tensor([100,   1, 198, 172,   1])
    """
    pieces = [
        np.append(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) + FIRST_BYTE, END_OF_DOCUMENT)
        for text in documents
    ]
    return torch.from_numpy(np.concatenate(pieces))
