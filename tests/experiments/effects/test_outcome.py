from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.effects.loss import Evaluation, loss_and_logits
from experiments.effects.outcome import Effect, effect_of
from experiments.effects.row_kernels import likeliest_of

TOKENS = torch.tensor([[0, 1, 2, 1], [2, 0, 1, 0]])
BATCH = {"input_ids": TOKENS}
PADDED = {"input_ids": TOKENS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
# Token 2 leads by one everywhere.
CLEAN = torch.tensor([1.0, 0.0, 2.0, -1.0]).expand(2, 4, 4).contiguous()
CLEAN_LOSS = loss_and_logits("causal", CLEAN, BATCH).loss


def effect(
    injected: Tensor, batch: dict[str, Tensor] = BATCH, critical_loss: float = 1e-3, clean: Tensor = CLEAN
) -> Effect:
    evaluations = [loss_and_logits("causal", logits, batch) for logits in (clean, injected)]
    return effect_of(*evaluations, batch, "causal", critical_loss)


def changed(row: int, position: int, token: int, value: float) -> Tensor:
    logits = CLEAN.clone()
    logits[row, position, token] = value
    return logits


def test_equal_to_the_bit_is_masked_and_every_difference_is_exactly_zero() -> None:
    assert effect(CLEAN.clone()) == Effect("masked", CLEAN_LOSS, 0.0, 0.0, 0.0, 0, 0)


def test_a_small_change_that_moves_no_prediction_is_benign() -> None:
    found = effect(changed(0, 0, 3, -1.0 + 1e-6))
    assert (found.outcome, found.top1_changed, found.nonfinite_rows) == ("benign", 0, 0)
    assert found.loss_diff is not None
    assert 0 < found.loss_diff < 1e-6
    assert found.kl_mean is not None
    assert 0 <= found.kl_mean < 1e-12
    assert 0 < found.relative_change < 1e-6


def test_one_other_bit_is_not_masked_even_if_no_number_moves() -> None:
    clean = changed(0, 0, 1, 0.0)
    found = effect(changed(0, 0, 1, -0.0), clean=clean)
    assert found == Effect("benign", CLEAN_LOSS, 0.0, 0.0, 0.0, 0, 0)


def test_another_prediction_is_critical_however_small_the_change_of_the_loss() -> None:
    found = effect(changed(0, 3, 0, 2.0 + 1e-6))
    assert (found.outcome, found.top1_changed, found.loss_diff) == ("critical", 1, 0.0)


@pytest.mark.parametrize(
    ("token", "outcome", "moved"),
    [pytest.param(0, "critical", 1, id="in front of the leader"), pytest.param(3, "benign", 0, id="behind the leader")],
)
def test_the_first_of_equal_logits_is_the_prediction(token: int, outcome: str, moved: int) -> None:
    found = effect(changed(0, 3, token, 2.0))  # As large as token 2.
    assert (found.outcome, found.top1_changed, found.loss_diff) == (outcome, moved, 0.0)


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.clone], ids=["numpy", "torch"])
@pytest.mark.parametrize("places", [(0, 1), (70, 71, 999), (5, 8, 500), (511, 512)], ids=str)
def test_the_first_of_equal_logits_is_the_likeliest_in_wide_rows(
    places: tuple[int, ...], convert: Callable[[Tensor], Any]
) -> None:
    logits = torch.zeros(1, 1000, dtype=torch.float64)
    logits[0, list(places)] = 1.5
    top, largest = likeliest_of(convert(logits))
    assert (top.tolist(), largest.tolist()) == ([places[0]], [1.5])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_loss_that_moves_by_more_than_allowed_is_critical_in_both_directions(sign: float) -> None:
    logits = changed(0, 0, 1, 0.0 + sign * 0.2)  # The target of this position; token 2 still leads.
    found = effect(logits)
    assert (found.outcome, found.top1_changed) == ("critical", 0)
    assert found.loss_diff is not None
    assert math.copysign(1, found.loss_diff) == -sign
    assert effect(logits, critical_loss=1.0).outcome == "benign"
    assert effect(logits, critical_loss=abs(found.loss_diff)).outcome == "benign"
    assert effect(logits, critical_loss=math.nextafter(abs(found.loss_diff), 0)).outcome == "critical"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 3])
def test_nan_and_inf_are_an_outcome_of_their_own_wherever_they_are(value: float, position: int) -> None:
    found = effect(changed(1, position, 3, value), critical_loss=1e9)
    assert (found.outcome, found.nonfinite_rows) == ("nonfinite", 1)


def test_nonfinite_rows_are_counted() -> None:
    logits = CLEAN.clone()
    logits[0] = math.nan
    logits[1, 2, 3] = math.inf
    found = effect(logits)
    assert (found.outcome, found.nonfinite_rows) == ("nonfinite", 5)
    assert found.loss_diff is not None
    assert math.isnan(found.loss_diff)
    assert found.kl_mean is not None
    assert math.isnan(found.kl_mean)


def test_finite_logits_with_a_loss_that_is_not_are_nonfinite() -> None:
    clean = CLEAN.double()
    injected = clean.clone()
    injected[0, 0] = torch.tensor([1.7e308, -1.7e308, 0.0, 0.0], dtype=torch.float64)
    found = effect(injected, clean=clean, critical_loss=1e9)
    assert (found.outcome, found.nonfinite_rows, found.loss_diff) == ("nonfinite", 0, math.inf)


def test_a_nan_that_was_there_before_the_fault_does_not_count_as_masked() -> None:
    # The gate looks at the first batch only.
    broken = changed(0, 0, 0, math.nan)
    assert effect(broken.clone(), clean=broken).outcome == "nonfinite"


def test_another_payload_of_nan_is_not_masked() -> None:
    clean, injected = changed(0, 0, 0, math.nan), changed(0, 0, 0, math.nan)
    injected.view(torch.int32)[0, 0, 0] ^= 1
    assert effect(injected, clean=clean).outcome == "nonfinite"


def test_padding_has_no_loss_and_no_predictions() -> None:
    found = effect(changed(1, 3, 1, 50.0), PADDED)
    assert (found.outcome, found.loss_diff, found.top1_changed, found.kl_mean) == ("benign", 0.0, 0, 0.0)
    assert found.relative_change == 0.0
    assert effect(changed(1, 0, 1, 50.0), PADDED).outcome == "critical"


# ------------------------------------------------------------------------------------------------- encoders


def encoder_effect(injected: Tensor, critical: float = 1e-3, clean: Tensor = CLEAN) -> Effect:
    return effect_of(Evaluation(None, None, clean), Evaluation(None, None, injected), BATCH, "encoder", critical)


def test_a_bare_encoder_has_no_loss_and_predicts_nothing() -> None:
    assert encoder_effect(CLEAN.clone()) == Effect("masked", None, None, 0.0, None, None, 0)
    found = encoder_effect(changed(0, 0, 0, 1.0 + 1e-6))
    assert (found.outcome, found.loss_diff, found.kl_mean, found.top1_changed) == ("benign", None, None, None)


def test_a_bare_encoder_is_judged_by_the_relative_change_of_its_output() -> None:
    logits = changed(0, 0, 0, 3.0)
    expected = 2.0 / math.sqrt(float((CLEAN.double() ** 2).sum()))
    found = encoder_effect(logits, critical=expected * 1.001)
    assert found.outcome == "benign"
    assert found.relative_change == pytest.approx(expected, rel=1e-12)
    assert encoder_effect(logits, critical=expected * 0.999).outcome == "critical"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bare_encoder_can_be_nonfinite(value: float) -> None:
    assert encoder_effect(changed(0, 0, 0, value), critical=1e9).outcome == "nonfinite"
