from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from kl import kl_per_position
from scipy.special import log_softmax
from torch import Tensor

from experiments.effects import row_kernels
from experiments.effects.loss import (
    aligned_targets,
    loss_and_logits,
    token_losses,
)
from experiments.errors import UsageError
from experiments.inputs.batches import IGNORED

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INFINITY = float("nan"), float("inf")


def random_logits(*shape: int, seed: int = 0, scale: float = 5.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tokens(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def oracle_losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    rows = log_softmax(logits.double().numpy(), axis=-1)
    return -rows[np.arange(len(rows)), targets.numpy()]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "_CHUNK_ELEMENTS", 20)


# Cross-entropy


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_losses_against_scipy(dtype: torch.dtype, small_pieces: None) -> None:
    logits, targets = random_logits(37, 9).to(dtype), random_tokens(37, vocabulary=9)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses.numpy(), oracle_losses(logits, targets), rtol=1e-13, atol=1e-14)


def test_token_losses_leave_out_what_has_no_target() -> None:
    logits, targets = random_logits(6, 4), random_tokens(6, vocabulary=4)
    some = targets.clone()
    some[[0, 3]] = IGNORED
    assert torch.equal(token_losses(logits, some), token_losses(logits, targets)[[1, 2, 4, 5]])
    assert token_losses(logits, torch.full((6,), IGNORED)).shape == (0,)


def test_losses_of_huge_and_tiny_logits() -> None:
    logits = torch.tensor([[1e30, -1e30], [3e38, 3e38], [1e-30, -1e-30]], dtype=torch.float32)
    losses = token_losses(logits, torch.tensor([1, 0, 1]))
    assert losses[0] == 2 * float(logits[0, 0].double())
    assert losses[1:].tolist() == pytest.approx([np.log(2)] * 2, rel=1e-15)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("column", [0, 2])
def test_non_finite_logits_give_a_non_finite_loss(value: float, column: int) -> None:
    logits = random_logits(2, 4, 5).float()
    logits[1, 1, column] = value
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    evaluation = loss_and_logits("causal", logits, {"input_ids": tokens})
    assert not np.isfinite(evaluation.loss)
    assert evaluation.sequence_losses.isfinite().tolist() == [True, False]
    if np.isnan(value):
        assert np.isnan(evaluation.loss)


def test_loss_does_not_depend_on_the_rest_of_the_batch(small_pieces: None) -> None:
    logits, tokens = random_logits(5, 11, 7).float(), random_tokens(5, 11, vocabulary=7)
    together = loss_and_logits("causal", logits, {"input_ids": tokens}).sequence_losses
    for row in range(5):
        alone = loss_and_logits("causal", logits[row : row + 1], {"input_ids": tokens[row : row + 1]})
        assert torch.equal(alone.sequence_losses, together[row : row + 1])


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 200))
@settings(max_examples=30)
def test_pieces_do_not_change_a_bit(rows: int, vocabulary: int, elements: int) -> None:
    logits, targets = random_logits(rows, vocabulary).float(), random_tokens(rows, vocabulary=vocabulary)
    other = random_logits(rows, vocabulary, seed=1).float()
    whole = token_losses(logits, targets), kl_per_position(logits, other)
    original = row_kernels._CHUNK_ELEMENTS
    try:
        row_kernels._CHUNK_ELEMENTS = elements
        pieces = token_losses(logits, targets), kl_per_position(logits, other)
    finally:
        row_kernels._CHUNK_ELEMENTS = original
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def test_causal_loss_is_the_models_own() -> None:
    model, tokens = gpt2(), random_tokens(3, 12, vocabulary=30)
    outputs = model(tokens, labels=tokens)
    evaluation = loss_and_logits("causal", outputs, {"input_ids": tokens})
    assert evaluation.loss == pytest.approx(float(outputs.loss), rel=1e-6)
    assert evaluation.sequence_losses.shape == (3,)
    assert evaluation.loss == pytest.approx(float(evaluation.sequence_losses.mean()), rel=1e-14)
    assert evaluation.output is outputs.logits


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    model, tokens = gpt2(), random_tokens(1, 9, vocabulary=30)
    short = loss_and_logits("causal", model(tokens), {"input_ids": tokens})
    padding = torch.full((1, 4), 7)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    masks = [torch.zeros_like(part) if part is padding else torch.ones_like(part) for part in parts]
    batch = {"input_ids": torch.cat(parts, dim=1), "attention_mask": torch.cat(masks, dim=1)}
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions)
    assert loss_and_logits("causal", outputs, batch).loss == pytest.approx(short.loss, rel=1e-5)
    assert int((aligned_targets("causal", batch) != IGNORED).sum()) == 8


@torch.no_grad()
def test_masked_loss_is_the_models_own() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    tokens = random_tokens(2, 8, vocabulary=30)
    labels = torch.full_like(tokens, IGNORED)
    labels[0, [1, 4, 6]], labels[1, 5] = tokens[0, [1, 4, 6]], tokens[1, 5]
    outputs = model(tokens, labels=labels)
    evaluation = loss_and_logits("masked", outputs, {"input_ids": tokens, "labels": labels})
    assert evaluation.loss == pytest.approx(float(outputs.loss), rel=1e-6)
    # the mean over the 4 targets, not the mean of the two sequences
    first, second = evaluation.sequence_losses.tolist()
    assert evaluation.loss == pytest.approx((3 * first + second) / 4, rel=1e-14)


@torch.no_grad()
def test_encoder_decoder_loss_is_the_models_own() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=30, **sizes)).eval()
    tokens, labels = random_tokens(2, 8, vocabulary=30), random_tokens(2, 5, vocabulary=30, seed=1)
    outputs = model(tokens, labels=labels)
    evaluation = loss_and_logits("encoder-decoder", outputs, {"input_ids": tokens, "labels": labels})
    assert evaluation.loss == pytest.approx(float(outputs.loss), rel=1e-6)


def test_encoder_has_no_loss() -> None:
    hidden = random_logits(2, 3, 4)
    outputs = SimpleNamespace(last_hidden_state=hidden, pooler_output=None)
    evaluation = loss_and_logits("encoder", outputs, {"input_ids": torch.ones(2, 3)})
    assert (evaluation.loss, evaluation.sequence_losses) == (None, None)
    assert evaluation.output is hidden


def test_labels_take_tokens_out_of_a_causal_loss() -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[1, IGNORED, 3, 4]])
    assert aligned_targets("causal", {"input_ids": tokens}).tolist() == [[2, 3, 4, IGNORED]]
    assert aligned_targets("causal", {"input_ids": tokens, "labels": labels}).tolist() == [[IGNORED, 3, 4, IGNORED]]


@pytest.mark.parametrize(
    ("family", "outputs", "batch", "message"),
    [
        ("casual", torch.zeros(1, 2, 3), {}, r"family: got 'casual', allowed .*did you mean 'causal'"),
        ("causal", SimpleNamespace(last_hidden_state=1), {}, r"outputs: got SimpleNamespace, .*\.logits"),
        ("encoder", SimpleNamespace(logits=1), {}, r"outputs: got SimpleNamespace, .*\.last_hidden_state"),
        ("causal", torch.zeros(2, 3), {}, r"outputs: got Tensor of shape \(2, 3\), allowed a 3-D tensor"),
        ("masked", torch.zeros(1, 2, 3), {"input_ids": torch.ones(1, 2).long()}, r"labels: missing; .* masked model"),
        (
            "causal",
            torch.zeros(2, 2, 3),
            {"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.tensor([[1, 1], [1, 0]])},
            r"labels: sequences \[1\] of the batch have no target",
        ),
        (
            "causal",
            torch.zeros(1, 5, 3),
            {"input_ids": torch.ones(1, 2).long()},
            r"labels: got shape \(1, 2\) for logits of \(1, 5, 3\)",
        ),
    ],
)
def test_what_has_no_loss(family: str, outputs: Any, batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loss_and_logits(family, outputs, batch)


# Divergence


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_against_scipy(dtype: torch.dtype, small_pieces: None) -> None:
    before, after = random_logits(3, 7, 9).to(dtype), random_logits(3, 7, 9, seed=1).to(dtype)
    p, q = (log_softmax(logits.double().numpy(), axis=-1) for logits in (before, after))
    expected = (np.exp(p) * (p - q)).sum(axis=-1)
    np.testing.assert_allclose(kl_per_position(before[0], after[0]).numpy(), expected[0], rtol=1e-12)


def test_kl_is_in_nats_and_not_symmetric() -> None:
    certain, even = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_per_position(certain, even).item() == pytest.approx(np.log(2), rel=1e-12)
    assert kl_per_position(even, certain).item() == pytest.approx(20 - np.log(2), rel=1e-12)


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(0, 1e-6))
@settings(max_examples=50)
def test_kl_is_never_negative_and_zero_without_change(seed: int, scale: float, change: float) -> None:
    before = random_logits(4, 6, seed=seed, scale=scale)
    after = before + change * random_logits(4, 6, seed=seed + 1)
    assert (kl_per_position(before, after) >= 0).all()
    assert torch.equal(kl_per_position(before, before.clone()), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_kl_of_non_finite_logits_is_not_finite(value: float) -> None:
    before = random_logits(1, 3, 4)
    after = before.clone()
    after[0, 1, 2] = value
    assert kl_per_position(before[0], after[0]).isfinite().tolist() == [True, False, True]
