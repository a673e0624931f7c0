"""Effects from changed rows alone are those from the whole output, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl import kl_per_position
from scipy.special import log_softmax
from torch import Tensor

from experiments.effects import row_kernels
from experiments.effects.baseline_rows import RowDifferences, measure_rows
from experiments.effects.loss import Evaluation, loss_and_logits
from experiments.effects.outcome import Effect, effect_of
from experiments.effects.row_effects import BaselineRows, RowEffect, effects_of_rows
from experiments.effects.row_kernels import (
    RowAnswers,
    answers_of,
    as_tensor,
    chances_of,
    changed_rows,
    divergences,
    row_norms,
)
from experiments.inputs.batches import IGNORED

NAN, INFINITY = float("nan"), float("inf")
WIDTHS = [(384, 60), (32000, 9), (50257, 9)]


def random_tokens(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def random_rows(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(left: Any, right: Any) -> bool:
    """Whether two numbers, effects or tensors are equal to the bit; NaN equals NaN."""
    if isinstance(left, Effect):
        return all(same(getattr(left, name), getattr(right, name)) for name in Effect.__dataclass_fields__)
    if isinstance(left, Tensor):
        return torch.equal(left.nan_to_num(nan=-7.0), right.nan_to_num(nan=-7.0))
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


def close(left: Any, right: Any) -> bool:
    """Whether two losses agree but for rounding; NaN equals NaN."""
    if left is None or right is None:
        return left is right
    return np.allclose(left, right, rtol=1e-13, atol=1e-15, equal_nan=True)


def whole(family: str, clean: Tensor, faulty: Tensor, batch: dict[str, Tensor]) -> RowEffect:
    """Return the effect on the whole output, with losses of the faulty one alone."""
    before, after = (loss_and_logits(family, output, batch) for output in (clean, faulty))
    effect = effect_of(before, after, batch, family, 1e-3)
    assert close(effect.injected_loss, after.loss)
    return RowEffect(effect, after.sequence_losses)


def assert_same(found: RowEffect, expected: RowEffect) -> None:
    assert same(found.effect, expected.effect), (found.effect, expected.effect)
    assert close(found.sequence_losses, expected.sequence_losses)


# ------------------------------------------------------------------------------- rows are the whole, to the last bit


def make_batch(family: str, B: int, T: int, vocabulary: int, random: np.random.Generator) -> dict[str, Tensor]:
    batch = {"input_ids": torch.from_numpy(random.integers(0, vocabulary, (B, T)))}
    if random.random() < 0.5:
        lengths = torch.from_numpy(random.integers(2, T + 1, B))
        batch["attention_mask"] = (torch.arange(T) < lengths[:, None]).long()
    if family == "masked" or (family == "causal" and random.random() < 0.5):
        labels = batch["input_ids"].clone()
        labels[torch.from_numpy(random.random((B, T)) < 0.3)] = IGNORED
        labels[:, :2] = batch["input_ids"][:, :2]
        batch["labels"] = labels
    return batch


def spoil(rows: Tensor, random: np.random.Generator) -> None:
    """Change rows in place, as faults do: a little, much, or beyond everything."""
    for row in rows:
        column = int(random.integers(rows.shape[1]))
        match random.integers(7):
            case 0:
                row[column] = float(random.choice([NAN, INFINITY, -INFINITY]))
            case 1:
                row[column] *= float(random.choice([-1e30, 1e20, 1e5]))
            case 2:
                row[:] = float(random.choice([NAN, 0.0, -INFINITY, 3e38]))
            case 3:
                row[column] = -row[column]
            case 4:
                row += 1e-6 * torch.from_numpy(random.standard_normal(rows.shape[1])).to(row)
            case 5:
                row += float(random.standard_normal()) * torch.from_numpy(random.standard_normal(rows.shape[1])).to(row)
            case _:
                pass  # as it was


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["causal", "masked", "encoder"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(1, 3),
    st.integers(2, 7),
    st.sampled_from([2, 5, 70, 384]),
    st.integers(1, 4),
)
def test_effects_of_rows_are_those_of_the_whole_output(
    seed: int, family: str, dtype: torch.dtype, B: int, T: int, width: int, num_runs: int
) -> None:
    random = np.random.default_rng(seed)
    batch = make_batch(family, B, T, width, random)
    clean = random_rows(B, T, width, seed=seed).to(dtype)
    if random.random() < 0.1:
        clean[0, 0, 0] = float(random.choice([NAN, INFINITY, -INFINITY]))
    rows, runs, logits, expected = [], [], [], []
    for run in range(num_runs):
        # some of these stay as they were
        chosen = torch.from_numpy(np.flatnonzero(random.random(B * T) < random.choice([0.0, 0.3, 1.0])))
        chosen = chosen[torch.from_numpy(random.permutation(len(chosen)))]
        faulty = clean.clone().view(-1, width)
        faulty[chosen] = (spoilt := faulty[chosen])
        spoil(spoilt, random)
        faulty[chosen] = spoilt
        rows.append(chosen)
        runs.append(torch.full_like(chosen, run))
        logits.append(spoilt)
        expected.append(whole(family, clean, faulty.view_as(clean), batch))
    known = BaselineRows.of(family, clean, batch)
    found = effects_of_rows(known, torch.cat(rows), torch.cat(logits), torch.cat(runs), num_runs, 1e-3)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_effect_is_that_of_scipy_on_the_whole_output(dtype: torch.dtype) -> None:
    batch = {
        "input_ids": random_tokens(2, 6, vocabulary=9),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    }
    clean = random_rows(2, 6, 9).to(dtype)
    faulty = clean.clone()
    faulty[0, 2:] += random_rows(4, 9, seed=1).to(dtype)
    faulty[1, 3:] += random_rows(3, 9, seed=2).to(dtype)
    found = whole("causal", clean, faulty, batch)
    real = batch["attention_mask"].numpy() != 0
    before, after = (logits.double().numpy() for logits in (clean, faulty))
    p, q = (log_softmax(logits, axis=-1) for logits in (before, after))
    assert found.effect.kl_mean == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1)[real].mean(), rel=1e-12)
    change = np.linalg.norm((after - before)[real]) / np.linalg.norm(before[real])
    assert found.effect.relative_change == pytest.approx(change, rel=1e-13)
    assert found.effect.top1_changed == (p.argmax(axis=-1) != q.argmax(axis=-1))[real].sum()
    tokens = batch["input_ids"].numpy()
    losses = [-q[0, np.arange(5), tokens[0, 1:]], -q[1, np.arange(3), tokens[1, 1:4]]]
    assert found.effect.injected_loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-13)
    assert found.sequence_losses is not None
    assert found.sequence_losses.tolist() == pytest.approx([part.mean() for part in losses], rel=1e-13)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_nothing_is_said_of_rows_that_were_not_finite_before(value: float) -> None:
    batch = {"input_ids": random_tokens(1, 4, vocabulary=5)}
    clean = random_rows(1, 4, 5)
    clean[0, 1, 2] = value
    faulty = clean.clone()
    faulty[0, 3] += 1.0
    effect = whole("causal", clean, faulty, batch).effect
    assert (effect.outcome, effect.nonfinite_rows) == ("nonfinite", 1)
    assert effect.kl_mean is not None
    assert math.isnan(effect.kl_mean)
    assert math.isnan(effect.relative_change)
    # a fault may even make such a row finite
    faulty[0, 1, 2] = 0.0
    assert whole("causal", clean, faulty, batch).effect.nonfinite_rows == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "count"), WIDTHS)
def test_a_row_has_the_same_numbers_in_any_company(width: int, count: int, dtype: torch.dtype) -> None:
    batch = {"input_ids": random_tokens(1, count, vocabulary=width)}
    clean = random_rows(1, count, width).to(dtype)
    known = BaselineRows.of("causal", clean, batch)
    # the last of three scales moves logits so little that divergences come from expm1
    rows = torch.arange(count).repeat(3)
    scales = torch.tensor([1.0, 1e-2, 1e-5]).repeat_interleave(count)[:, None]
    values = (clean[0][rows].float() + scales * random_rows(len(rows), width, seed=1, scale=1.0)).to(dtype)
    together = measure_rows(known, rows, values)
    generator = torch.Generator().manual_seed(2)
    for size in (1, 2, 3, 7, len(rows) // 2, len(rows)):
        chosen = torch.randperm(len(rows), generator=generator)[:size]
        for some, every in zip(measure_rows(known, rows[chosen], values[chosen]), together, strict=True):
            assert torch.equal(some, every[chosen])


@pytest.mark.parametrize("elements", [1, 1000, 1 << 20])
def test_pieces_and_threads_do_not_change_a_bit(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    width, count = 20011, 5
    batch = {"input_ids": random_tokens(1, count, vocabulary=width)}
    clean = random_rows(1, count, width)
    rows = torch.arange(count).repeat(2)
    values = clean[0][rows] + 1e-5 * random_rows(len(rows), width, seed=1)

    def measured() -> tuple[RowDifferences, RowAnswers]:
        known = BaselineRows.of("causal", clean, batch)
        assert known.answers is not None
        return measure_rows(known, rows, values), known.answers

    usual = measured()
    threads = torch.get_num_threads()
    monkeypatch.setattr(row_kernels, "_CHUNK_ELEMENTS", elements)
    try:
        torch.set_num_threads(2)
        other = measured()
    finally:
        torch.set_num_threads(threads)
    for left, right in zip([*usual[0], *usual[1]], [*other[0], *other[1]], strict=True):
        assert torch.equal(as_tensor(left), as_tensor(right))


def test_a_run_without_rows_is_masked() -> None:
    batch = {"input_ids": random_tokens(2, 3, vocabulary=5)}
    clean = random_rows(2, 3, 5)
    known = BaselineRows.of("causal", clean, batch)
    none = torch.empty(0, dtype=torch.int64)
    found = effects_of_rows(known, none, torch.empty(0, 5), none, 2, 1e-3)
    evaluation = loss_and_logits("causal", clean, batch)
    for run in found:
        assert_same(run, RowEffect(Effect("masked", evaluation.loss, 0.0, 0.0, 0.0, 0, 0), evaluation.sequence_losses))
    # so is one whose rows are as they were
    same_row = effects_of_rows(known, torch.tensor([4]), clean[1, 1:2], torch.tensor([1]), 2, 1e-3)
    assert [run.effect.outcome for run in same_row] == ["masked", "masked"]


def test_the_baselines_rows_may_be_given_to_effect_of() -> None:
    batch = {"input_ids": random_tokens(2, 3, vocabulary=5)}
    clean, faulty = random_rows(2, 3, 5), random_rows(2, 3, 5, seed=1)
    before, after = (loss_and_logits("causal", logits, batch) for logits in (clean, faulty))
    known = BaselineRows.of("causal", clean, batch)
    effects = [effect_of(before, after, batch, "causal", 1e-3, rows) for rows in (None, known)]
    assert same(*effects)
    assert known.loss == before.loss
    assert known.values.data_ptr() == clean.data_ptr()


def test_outputs_that_do_not_compare() -> None:
    batch = {"input_ids": random_tokens(1, 2, vocabulary=3)}
    pair = Evaluation(1.0, None, torch.zeros(1, 2, 3)), Evaluation(1.0, None, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"injected: got torch.float32 \(1, 2, 4\), allowed .* \(1, 2, 3\)"):
        effect_of(*pair, batch, "causal", 1e-3)
    with pytest.raises(ValueError, match="nothing but zeros"):
        effect_of(pair[0], Evaluation(1.0, None, torch.ones(1, 2, 3)), batch, "causal", 1e-3)
    hidden = {"input_ids": torch.ones(1, 3).long()}
    with pytest.raises(ValueError, match=r"mask: got torch.bool \(1, 3\), allowed bool \(1, 2\)"):
        BaselineRows.of("encoder", torch.zeros(1, 2, 3), hidden)
    hidden = {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2).long()}
    with pytest.raises(ValueError, match="mask: got no position that counts"):
        BaselineRows.of("encoder", torch.zeros(1, 2, 3), hidden)


@pytest.mark.parametrize(
    ("rows", "logits", "runs", "message"),
    [
        ([0, 6], torch.zeros(2, 5), [0, 0], r"rows: got 0 \.\. 6, allowed numbers from 0 to 5"),
        ([0, 1], torch.zeros(2, 5), [0, 2], r"runs: got 0 \.\. 2, allowed numbers from 0 to 1"),
        ([0, 1], torch.zeros(2, 5), [1, 0], r"runs: got an unsorted order"),
        ([1, 1], torch.zeros(2, 5), [0, 0], r"rows: got a row twice in one run"),
        ([1.0, 1.0], torch.zeros(2, 5), [0, 0], r"rows: got torch.float32 \(2,\), allowed int64 \(2,\)"),
        ([1, 2], torch.zeros(2, 4), [0, 0], r"logits: got torch.float32 \(2, 4\), allowed torch.float32 \(2, 5\)"),
        ([1, 2], torch.zeros(2, 5).double(), [0, 0], r"logits: got torch.float64 \(2, 5\), allowed torch.float32"),
    ],
)
def test_arguments_that_do_not_fit(rows: list[Any], logits: Tensor, runs: list[int], message: str) -> None:
    known = BaselineRows.of("causal", random_rows(2, 3, 5), {"input_ids": random_tokens(2, 3, vocabulary=5)})
    with pytest.raises(ValueError, match=message):
        effects_of_rows(known, torch.tensor(rows), logits, torch.tensor(runs), 2, 1e-3)


# -------------------------------------------------------------------------------------------- arithmetic on rows


def exact_divergence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return KL in extended precision: 64 bits of mantissa, and no difference of large numbers."""
    b, a = before.astype(np.longdouble), after.astype(np.longdouble)
    p = np.exp(b - b.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    d = a - b
    d -= (p * d).sum(axis=1, keepdims=True)
    return np.log1p((p * np.expm1(d)).sum(axis=1)) - (p * d).sum(axis=1)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision here")
@pytest.mark.parametrize("shift", [0.0, 0.125])
@pytest.mark.parametrize("change", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("width", [384, 50257])
def test_small_divergences_have_their_digits(width: int, change: float, shift: float) -> None:
    before = random_rows(6, width)
    after = before + shift + change * random_rows(6, width, seed=1, scale=1.0)
    found = kl_per_position(before, after).numpy()
    expected = exact_divergence(before.numpy(), after.numpy())
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-7)


def exact_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return cross-entropies in extended precision."""
    x = logits.astype(np.longdouble)
    x -= x.max(axis=1, keepdims=True)
    return np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(x)), targets]


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision here")
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.5, 0.999, 1.001, 3.0, 100.0])
@pytest.mark.parametrize("width", [384, 50257])
def test_rows_near_and_far_have_the_digits_of_losses_and_divergences(width: int, size: float) -> None:
    tokens = random_tokens(1, 7, vocabulary=width)
    clean = random_rows(1, 7, width).double()
    known = BaselineRows.of("causal", clean, {"input_ids": tokens})
    change = random_rows(6, width, seed=1, scale=1.0).double()
    faulty = clean[0, :6] + size * change / change.norm(dim=1, keepdim=True)
    found = measure_rows(known, torch.arange(6), faulty)
    assert found.losses is not None
    assert found.divergences is not None
    before, after = clean[0, :6].numpy(), faulty.numpy()
    np.testing.assert_allclose(found.divergences, exact_divergence(before, after).astype(float), rtol=1e-6, atol=1e-24)
    expected = exact_losses(after, tokens[0, 1:].numpy())
    np.testing.assert_allclose(found.losses, expected.astype(float), rtol=1e-14)


def test_near_and_far_rows_in_one_piece_have_the_numbers_they_have_alone() -> None:
    clean = random_rows(1, 9, 5000)
    known = BaselineRows.of("causal", clean, {"input_ids": random_tokens(1, 9, vocabulary=5000)})
    rows = torch.arange(9).repeat(2)
    sizes = torch.tensor([1e-4, 1.0, 50.0]).repeat(6)[:, None]
    change = random_rows(18, 5000, seed=1, scale=1.0)
    values = clean[0][rows] + sizes * change / change.norm(dim=1, keepdim=True)
    together = measure_rows(known, rows, values)
    for row in range(18):
        for some, every in zip(measure_rows(known, rows[row : row + 1], values[row : row + 1]), together, strict=True):
            assert torch.equal(some, every[row : row + 1])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision here")
def test_the_divergence_of_one_bit_has_its_digits() -> None:
    before = random_rows(40, 384)
    after = before.clone()
    after.view(torch.int32)[torch.arange(40), random_tokens(40, vocabulary=384)] ^= 1
    found = kl_per_position(before, after).numpy()
    expected = exact_divergence(before.numpy(), after.numpy())
    assert expected.max() < 1e-13
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-6)


def test_the_divergence_of_a_token_that_was_next_to_impossible() -> None:
    # exp of the change overflows, although the divergence is small
    before = torch.tensor([[0.0, -1000.0]], dtype=torch.float64)
    after = torch.tensor([[0.0, -20.0]], dtype=torch.float64)
    assert kl_per_position(before, after).item() == pytest.approx(math.log1p(math.exp(-20.0)), rel=1e-6)


def test_norms_of_extreme_rows() -> None:
    rows = np.array([[3.0, 4.0], [3e200, 4e200], [3e-200, 4e-200], [0.0, 0.0], [NAN, 1.0], [1.0, -INFINITY]])
    with np.errstate(all="ignore"):
        norms = row_norms(rows).tolist()
    assert norms[:4] == pytest.approx([5.0, 5e200, 5e-200, 0.0], rel=1e-15)
    assert math.isnan(norms[4])
    assert norms[5] == INFINITY


@pytest.mark.parametrize("width", [3, 64, 65, 50257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_changed_rows_are_found_by_one_bit(width: int, dtype: torch.dtype) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    baseline = random_rows(4, width).to(dtype)
    baseline[2, 0] = NAN
    rows = torch.tensor([2, 0, 2, 3, 0, 1])
    logits = baseline[rows].clone()
    logits.view(integer)[1, width - 1] ^= 1  # the lowest bit of the last number
    logits.view(integer)[2, 0] ^= 1  # another NaN
    logits[4, width // 2] *= -1.0  # the sign
    assert changed_rows(baseline, rows, logits).tolist() == [False, True, True, False, True, False]


def test_zero_is_not_minus_zero() -> None:
    assert changed_rows(torch.zeros(1, 200), torch.tensor([0]), -torch.zeros(1, 200)).tolist() == [True]


def test_the_arithmetic_of_other_devices_is_the_same() -> None:
    # tensors go the way of a GPU
    before, after, targets = random_rows(7, 9000), random_rows(7, 9000, seed=1), random_tokens(7, vocabulary=9000)
    after[0, 0], after[1], after[2] = NAN, -INFINITY, before[2] * (1 + 1e-6)
    targets[3] = IGNORED

    def numbers(use: Any) -> list[Tensor]:
        rows = [use(values.double()) for values in (before, after)]
        answers = [answers_of(values, use(targets)) for values in rows]
        apart = divergences(rows[1] - rows[0], chances_of(rows[0], answers[0]), *answers)
        return [as_tensor(values) for values in (*answers[0], *answers[1], apart, row_norms(rows[1]))]

    with np.errstate(all="ignore"):
        for tensors, arrays in zip(numbers(lambda values: values), numbers(row_kernels.as_array), strict=True):
            torch.testing.assert_close(tensors, arrays, rtol=1e-9, atol=0.0, equal_nan=True)
