from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from micro_campaign import micro_gpt2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bounds.finite_detector import FiniteDetector
from experiments.config import DetectConfig, ExperimentConfig, FaultConfig, IndexConfig, ModelConfig, RunConfig
from experiments.engine import plain as plain_runs
from experiments.errors import CheckRefusedError, UsageError
from experiments.passes.baseline import timed_forward
from experiments.runner import CompleteExperimentRunner
from experiments.tables.schema import UNREPEATABLE, ExperimentResult
from fault_injection import (
    KINDS,
    LOCATIONS,
    check_kv_consistency,
    injected,
    instrumentation_of,
    is_patched,
    monkey_patch_model,
    patched,
    unpatch_model,
)
from monitoring import TraceWriter

TOKENS = torch.randint(3, 259, (3, 2, 12), generator=torch.Generator().manual_seed(5))
BATCHES = list(TOKENS)
FAST = {"detectors": ["finite", "s@w"]}


@pytest.fixture(scope="module")
def shared_model() -> nn.Module:
    return micro_gpt2()


@pytest.fixture
def model(shared_model: nn.Module) -> Iterator[nn.Module]:
    yield shared_model
    assert not is_patched(shared_model)
    assert not shared_model.training


def bert(kind: type[Any]) -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(config).eval()


def without_timings(result: ExperimentResult) -> dict[str, Any]:
    # repr, so that NaN equals NaN and 0.0 does not equal -0.0.
    return {key: repr(value) for key, value in dataclasses.asdict(result).items() if key not in UNREPEATABLE}


def same(one: list[ExperimentResult], other: list[ExperimentResult]) -> bool:
    return list(map(without_timings, one)) == list(map(without_timings, other))


def config_of(**changes: Any) -> ExperimentConfig:
    where = {} if "fault" in changes else {"injection_location": "scores"}
    return ExperimentConfig(**{"exp_name": "demo", "num_runs": 4, **where, **FAST, **changes})


# --------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("location", LOCATIONS)
def test_every_number_of_a_row_is_that_of_an_independent_pass(model: nn.Module, location: str) -> None:
    runner = CompleteExperimentRunner(config_of(injection_location=location, num_runs=6))
    results = runner.run_all(model, BATCHES)
    assert [result.run_id for result in results] == [run.run_id for run in runner.plan.runs]
    for result, record in zip(results, runner.records, strict=True):
        (fault,) = record.faults
        tokens = BATCHES[result.batch_index]
        with torch.no_grad(), patched(model):
            clean = model(tokens, use_cache=False).logits
            with injected(model, [fault]) as injector:
                faulty = model(tokens, use_cache=False).logits
        for logits, loss in ((clean, result.baseline_loss), (faulty, result.injected_loss)):
            expected = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
            assert loss == pytest.approx(float(expected), rel=1e-12, nan_ok=True)
        hit = injector.records[0]
        assert (result.value_before, result.value_after) == pytest.approx(
            (hit.value_before, hit.value_after), nan_ok=True
        )
        assert int(result.bits_before, 16) ^ int(result.bits_after, 16) == 1 << result.bit
        assert (result.index_batch, result.index_head, result.index_row, result.index_col) == fault.index
        assert (result.layer, result.module) == (fault.layer, f"transformer.h.{fault.layer}.attn")
        assert result.top1_changed == int((clean.argmax(-1) != faulty.argmax(-1)).sum()) or result.nonfinite
        assert (result.outcome == "masked") == torch.equal(clean.view(torch.int32), faulty.view(torch.int32))
        assert result.nonfinite == (not bool(faulty.isfinite().all()))


def test_what_a_row_says_agrees_with_itself(model: nn.Module) -> None:
    config = config_of(num_runs=8, sweep={"fault.location": list(LOCATIONS), "fault.bit": [0, 30]})
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    assert {result.outcome for result in results} == {"masked", "benign", "critical", "nonfinite"}
    for result in results:
        assert result.hits == 1
        assert result.layers == str(result.layer)
        assert result.outcome != "masked" or (result.loss_diff, result.kl_mean, result.top1_changed) == (0.0, 0.0, 0)
        assert repr(result.loss_diff) == repr(result.injected_loss - result.baseline_loss)
        assert result.nonfinite == (result.outcome == "nonfinite")
        if result.nonfinite:
            assert result.violation_detected
            assert "finite" in result.detectors.split(";")
        if result.outcome == "benign":
            assert abs(result.loss_diff) <= 1e-3
            assert result.top1_changed == 0
        assert result.violation_detected == bool(result.detectors) == (result.num_violations > 0)
        assert result.effective
        assert (result.oracle_detected, result.oracle_detectors) == (None, "")
        assert 0 <= result.injection_seconds <= result.total_seconds


def test_masked_differences_are_exactly_zero(model: nn.Module) -> None:
    config = config_of(injection_location="weights", injection_bit=0, num_runs=40)
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    masked = [result for result in results if result.outcome == "masked"]
    assert masked
    for result in masked:
        assert (repr(result.loss_diff), result.relative_change) == ("0.0", 0.0)
        assert result.injected_loss == result.baseline_loss


@pytest.mark.parametrize("location", ["v", "weights"])
def test_a_fault_that_makes_nan_is_an_outcome_of_its_own(model: nn.Module, location: str) -> None:
    config = config_of(injection_location=location, injection_kind="random_value", num_runs=150)
    if location == "v":
        config = config_of(injection_location="v", injection_bit=30, num_runs=60)
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    nonfinite = [result for result in results if result.outcome == "nonfinite"]
    assert nonfinite
    for result in nonfinite:
        assert result.nonfinite
        assert result.violation_detected
        assert "finite" in result.detectors.split(";")
    assert any(math.isnan(result.value_after) for result in nonfinite)
    # What the last position of a window predicts is not in the loss, so the loss alone does not tell.
    assert any(math.isnan(result.loss_diff) for result in nonfinite)


def test_an_overflow_behind_the_last_attention_is_seen_by_finite(model: nn.Module) -> None:
    config = config_of(injection_location="out", injection_bit=30, injection_layers=1, num_runs=40)
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    behind = [r for r in results if r.outcome == "nonfinite" and math.isfinite(r.value_after)]
    for result in behind:
        assert "finite" in result.detectors.split(";")


# --------------------------------------------------------------------------------------------- repeatability


def test_a_single_run_is_that_of_all_runs(model: nn.Module) -> None:
    config = config_of(sweep={"fault.location": ["q", "out"], "fault.bit": [3, 30]}, num_runs=2)
    runner = CompleteExperimentRunner(config)
    results = runner.run_all(model, BATCHES)
    for number in (7, 0, 4):
        fresh = CompleteExperimentRunner(config)
        assert same([fresh.run_single(number, model, BATCHES)], [results[number]])
        assert same([runner.run_single(number, model, BATCHES)], [results[number]])
        assert same([fresh.run_single(results[number].run_id, model, BATCHES)], [results[number]])
        assert len(fresh.records) == 1
    assert same(runner.run_all(model, BATCHES), results)


def test_the_state_of_global_generators_does_not_matter_and_is_not_touched(model: nn.Module) -> None:
    runner = CompleteExperimentRunner(config_of())
    results = runner.run_all(model, BATCHES)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert same(runner.run_all(model, BATCHES), results)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_seeds_draw_other_faults(model: nn.Module) -> None:
    faults = []
    for seed in (0, 1):
        runner = CompleteExperimentRunner(config_of(seed=seed, num_runs=6))
        runner.run_all(model, BATCHES)
        faults.append({record.faults for record in runner.records})
    assert not faults[0] & faults[1]
    assert len(faults[0]) == 6


def test_detectors_do_not_change_the_faults_nor_what_they_do(model: nn.Module) -> None:
    both = [
        CompleteExperimentRunner(config_of(detectors=names)).run_all(model, BATCHES)
        for names in ([], ["finite", "s@w", "q@o", "comb", "oracle_s@w", "oracle_q@o", "oracle_comb"])
    ]
    effects = [
        [(r.run_id, r.fault_id, repr(r.injected_loss), r.outcome, r.bits_after) for r in results] for results in both
    ]
    assert effects[0] == effects[1]
    for result in both[0]:
        assert (result.violation_detected, result.num_violations, result.oracle_detected) == (False, 0, None)
        assert result.epsilon_margin is None


def test_repeating_the_baseline_gives_the_same_numbers(model: nn.Module) -> None:
    cached, repeated = (
        CompleteExperimentRunner(config_of(num_runs=8, run=RunConfig(reuse_baseline=reuse))).run_all(model, BATCHES)
        for reuse in (True, False)
    )
    assert same(cached, repeated)


def test_a_baseline_that_does_not_repeat_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def drifting(*arguments: Any) -> Any:
        evaluation, seconds = timed_forward(*arguments)
        return dataclasses.replace(
            evaluation, output=torch.nextafter(evaluation.output, torch.tensor(torch.inf))
        ), seconds

    monkeypatch.setattr(plain_runs, "timed_forward", drifting)
    runner = CompleteExperimentRunner(config_of(run=RunConfig(reuse_baseline=False)))
    with pytest.raises(CheckRefusedError, match="did not repeat bit for bit"):
        runner.run_all(model, BATCHES)


def test_the_loss_that_counts_as_critical_changes_the_word_and_nothing_else(model: nn.Module) -> None:
    config = {"num_runs": 10, "injection_location": "q", "injection_bit": 22}
    strict, lax = (
        CompleteExperimentRunner(config_of(**config, critical_loss=limit)).run_all(model, BATCHES)
        for limit in (0.0, 1e9)
    )
    assert {r.outcome for r in strict if r.loss_diff != 0.0} == {"critical"}
    assert {r.outcome for r in lax if r.top1_changed == 0} <= {"benign", "masked"}
    assert [r.loss_diff for r in strict] == [r.loss_diff for r in lax]


# --------------------------------------------------------------------------------------------- the model given back


def test_the_model_is_given_back_as_it_was(shared_model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in shared_model.state_dict().items()}
    implementation = shared_model.config._attn_implementation
    with torch.no_grad():
        logits = shared_model(BATCHES[0]).logits
    CompleteExperimentRunner(config_of()).run_all(shared_model, BATCHES)
    assert not is_patched(shared_model)
    assert shared_model.config._attn_implementation == implementation
    for name, tensor in shared_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        assert torch.equal(shared_model(BATCHES[0]).logits, logits)


def test_a_model_in_training_mode_is_given_back_in_training_mode() -> None:
    model = micro_gpt2().train()
    model.transformer.h[0].eval()
    results = CompleteExperimentRunner(config_of()).run_all(model, BATCHES)
    assert model.training
    assert not model.transformer.h[0].training
    assert same(results, CompleteExperimentRunner(config_of()).run_all(micro_gpt2(), BATCHES))


def test_an_unpatched_model_is_unpatched_also_after_an_exception(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any) -> None:
        raise RuntimeError("a detector with a defect")

    monkeypatch.setattr(FiniteDetector, "judge", explode)
    with pytest.raises(RuntimeError, match="a detector with a defect"):
        CompleteExperimentRunner(config_of()).run_all(model, BATCHES)
    assert not is_patched(model)


def test_a_model_that_was_patched_with_layers_keeps_its_patch_and_its_layers() -> None:
    model = monkey_patch_model(micro_gpt2(layers=3), injection_layers=[1])
    instrumentation = instrumentation_of(model)
    results = CompleteExperimentRunner(config_of(num_runs=12)).run_all(model, BATCHES)
    assert {result.layer for result in results} == {1}
    assert instrumentation_of(model) is instrumentation
    assert instrumentation.injection_layers == (1,)
    unpatch_model(model)


def test_a_patched_model_stays_patched_also_after_an_exception() -> None:
    model = monkey_patch_model(micro_gpt2())
    with pytest.raises(UsageError, match=r"fault\.layers: got 99, allowed 0\.\.1"):
        CompleteExperimentRunner(config_of(injection_layers=99)).run_all(model, BATCHES)
    assert is_patched(model)
    unpatch_model(model)


def test_layers_that_the_patch_does_not_allow_are_refused() -> None:
    model = monkey_patch_model(micro_gpt2(layers=3), injection_layers=[1])
    with pytest.raises(UsageError, match=r"fault\.layers: got 0, allowed \[1\]"):
        CompleteExperimentRunner(config_of(injection_layers=[0, 1])).run_all(model, BATCHES)
    unpatch_model(model)


def test_a_pattern_chooses_among_the_layers_that_the_patch_allows() -> None:
    model = monkey_patch_model(micro_gpt2(layers=3), injection_layers=[0, 1])
    results = CompleteExperimentRunner(config_of(injection_layer_pattern=r"h\.[12]\.")).run_all(model, BATCHES)
    assert {result.layers for result in results} == {"1"}
    unpatch_model(model)


def test_keys_and_values_are_made_equal_for_the_campaign_only(model: nn.Module) -> None:
    config = config_of(force_kv_equal=True, detectors=["q@o"])
    runner = CompleteExperimentRunner(config)
    forced = runner.run_all(model, BATCHES)
    plain = CompleteExperimentRunner(config_of(detectors=["q@o"])).run_all(model, BATCHES)
    assert [r.baseline_loss for r in forced] != [r.baseline_loss for r in plain]
    assert not any(entry.kv_equal for entry in check_kv_consistency(model).values())


def test_keys_and_values_of_a_model_that_was_patched_without_are_not_left_as_they_are() -> None:
    model = monkey_patch_model(micro_gpt2())
    with pytest.raises(UsageError, match=r"model\.force_kv_equal: the model is already patched"):
        CompleteExperimentRunner(config_of(force_kv_equal=True)).run_all(model, BATCHES)
    unpatch_model(model)
    monkey_patch_model(model, force_kv_equal=True)
    forced = CompleteExperimentRunner(config_of(force_kv_equal=True)).run_all(model, BATCHES)
    unpatch_model(model)
    expected = CompleteExperimentRunner(config_of(force_kv_equal=True)).run_all(model, BATCHES)
    assert [result.baseline_loss for result in forced] == [result.baseline_loss for result in expected]


# --------------------------------------------------------------------------------------------- kinds of faults


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("location", ["k", "weights"])
def test_every_kind_runs_and_says_what_it_did(model: nn.Module, kind: str, location: str) -> None:
    fault = FaultConfig(location=location, kind=kind, rate=1e-3 if kind == "bit_error_rate" else None)
    runner = CompleteExperimentRunner(config_of(num_runs=5, fault=fault))
    results = runner.run_all(model, BATCHES)
    for result, record in zip(results, runner.records, strict=True):
        assert (result.kind, result.hits) == (kind, sum(len(f.elements) for f in record.faults))
        before, after = int(result.bits_before, 16), int(result.bits_after, 16)
        if kind == "bitflip":
            assert before ^ after == 1 << result.bit
        elif kind == "stuck_at_0":
            assert after == before & ~(1 << result.bit)
        elif kind == "stuck_at_1":
            assert after == before | 1 << result.bit
        elif kind == "zero":
            assert (after, repr(result.value_after), result.bit) == (0, "0.0", None)
        if kind in ("stuck_at_0", "stuck_at_1"):
            assert result.effective == (before != after)
            assert result.effective or result.outcome == "masked"
        assert (result.bits is None) == (kind in ("zero", "random_value", "bit_error_rate"))


def test_a_bit_error_rate_hits_many_elements(model: nn.Module) -> None:
    fault = FaultConfig(location="v", kind="bit_error_rate", rate=0.01)
    results = CompleteExperimentRunner(config_of(num_runs=10, fault=fault)).run_all(model, BATCHES)
    # 2 sequences x 2 heads x 12 keys x 8 channels x 32 bits: 123 flips expected, almost all in different elements.
    assert 80 < sum(result.hits for result in results) / 10 < 150
    assert all(result.effective for result in results)


def test_a_bit_error_rate_that_hits_nothing_is_recorded_as_such(model: nn.Module) -> None:
    fault = FaultConfig(location="v", kind="bit_error_rate", rate=1e-12)
    results = CompleteExperimentRunner(config_of(num_runs=3, fault=fault)).run_all(model, BATCHES)
    for result in results:
        assert (result.hits, result.effective, result.outcome, result.loss_diff) == (0, False, "masked", 0.0)
        assert (result.index_row, result.value_before, result.bits_after, result.bit_field) == (None, None, None, None)


def test_several_bits_of_one_element(model: nn.Module) -> None:
    (result,) = CompleteExperimentRunner(config_of(injection_bit=[0, 23, 31], num_runs=1)).run_all(model, BATCHES)
    assert (result.bit, result.bits, result.bit_field) == (None, "0;23;31", "mixed")
    assert int(result.bits_before, 16) ^ int(result.bits_after, 16) == 1 << 31 | 1 << 23 | 1


@pytest.mark.parametrize(
    "sweep",
    [
        {"fault.bit": [14, [7, 8], "exponent", "sign"]},
        {"fault.layers": [0, [0, 1]]},
        {"detect.detectors": [["finite"], []]},
    ],
    ids=str,
)
def test_axes_whose_values_are_lists(model: nn.Module, sweep: dict[str, Any]) -> None:
    config = config_of(sweep=sweep, num_runs=1)
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    assert len(results) == len(next(iter(sweep.values())))
    assert same([CompleteExperimentRunner(config).run_single(1, model, BATCHES)], [results[1]])


@pytest.mark.parametrize(
    ("field", "bits"), [("sign", {31}), ("exponent", set(range(23, 31))), ("mantissa", set(range(23)))]
)
def test_a_field_of_bits(model: nn.Module, field: str, bits: set[int]) -> None:
    results = CompleteExperimentRunner(config_of(injection_bit=field, num_runs=12)).run_all(model, BATCHES)
    assert {result.bit for result in results} <= bits
    assert {result.bit_field for result in results} == {field}


def test_all_layers_at_once(model: nn.Module) -> None:
    runner = CompleteExperimentRunner(config_of(injection_layer_mode="all", num_runs=5))
    for result in runner.run_all(model, BATCHES):
        assert (result.layer, result.layers, result.hits) == (0, "0;1", 2)
    for record in runner.records:
        assert [fault.layer for fault in record.faults] == [0, 1]


def test_the_flat_spelling_of_the_documents_runs(model: nn.Module) -> None:
    config = ExperimentConfig(
        exp_name="demo", injection_layers=[0, 1], injection_layer_mode="specific", injection_location="scores",
        injection_bit=15, tolerance=1e-5, num_runs=10,
    )  # fmt: skip
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    assert len(results) == 10
    for result in results:
        assert (result.layers, result.bit, result.location) == ("0;1", 15, "scores")
        for name in ("baseline_loss", "injected_loss", "loss_diff", "violation_detected", "num_violations", "outcome"):
            assert getattr(result, name) is not None


def test_a_fixed_element_is_hit(model: nn.Module) -> None:
    fault = FaultConfig(location="weights", bit=30, layers=1, index=IndexConfig(batch=1, head=0, row=7, col=3))
    for result in CompleteExperimentRunner(config_of(fault=fault)).run_all(model, BATCHES):
        assert (result.index_batch, result.index_head, result.index_row, result.index_col) == (1, 0, 7, 3)
        assert (result.layer, result.masked_position) == (1, False)


def test_faults_hit_only_visible_keys_unless_asked_for(model: nn.Module) -> None:
    plain = CompleteExperimentRunner(config_of(num_runs=60)).run_all(model, BATCHES)
    assert all(result.index_col <= result.index_row for result in plain)
    fault = FaultConfig(location="scores", bit=3, include_masked=True)
    every = CompleteExperimentRunner(config_of(num_runs=60, fault=fault)).run_all(model, BATCHES)
    hidden = [result for result in every if result.index_col > result.index_row]
    assert 10 < len(hidden) < 50
    for result in hidden:
        assert (result.masked_position, result.effective, result.outcome) == (True, False, "masked")


def test_a_fault_at_a_hidden_weight_is_effective(model: nn.Module) -> None:
    # A weight that should be zero and is not lets the query see the future.
    fault = FaultConfig(location="weights", bit=30, index=IndexConfig(row=2, col=9))
    for result in CompleteExperimentRunner(config_of(fault=fault)).run_all(model, BATCHES):
        assert (result.masked_position, result.value_before) == (True, 0.0)
        assert (result.value_after, result.effective) == (2.0, True)
        assert result.outcome != "masked"


# --------------------------------------------------------------------------------------------- families and inputs


def test_padding_neither_counts_nor_is_seen(model: nn.Module) -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask} for tokens in BATCHES]
    runner = CompleteExperimentRunner(config_of(num_runs=40, injection_location="weights"))
    for result in runner.run_all(model, batches):
        if result.index_batch == 1:
            assert result.index_col < 7
    with torch.no_grad():
        short = CompleteExperimentRunner(config_of(num_runs=1)).run_all(model, [TOKENS[0][1:, :7]])
    assert math.isfinite(short[0].baseline_loss)


def test_a_masked_model() -> None:
    labels = torch.full((2, 12), -100)
    labels[:, 3] = 5
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    model = bert(transformers.BertForMaskedLM)
    config = config_of(num_runs=3, sweep={"fault.location": list(LOCATIONS)})
    results = CompleteExperimentRunner(config).run_all(model, [{"input_ids": tokens, "labels": labels}])
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=labels).loss
    for result in results:
        assert result.baseline_loss == pytest.approx(float(expected), rel=1e-5)
    assert all(result.kl_mean is not None for result in results)


def test_an_encoder_has_no_loss_and_says_so() -> None:
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    config = config_of(num_runs=3, sweep={"fault.location": list(LOCATIONS)})
    runner = CompleteExperimentRunner(config, family="encoder")
    for result in runner.run_all(bert(transformers.BertModel), [{"input_ids": tokens}]):
        assert (result.baseline_loss, result.injected_loss, result.loss_diff) == (None, None, None)
        assert (result.kl_mean, result.top1_changed) == (None, None)
        assert result.outcome in ("masked", "benign", "critical", "nonfinite")
        assert (result.relative_change == 0.0) == (result.outcome == "masked")


@pytest.mark.parametrize(
    ("build", "labelled", "family"),
    [
        (lambda: bert(transformers.BertModel), False, "encoder"),
        (lambda: bert(transformers.BertForMaskedLM), True, "masked"),
        (lambda: micro_gpt2(vocabulary=40), False, "causal"),
        (lambda: micro_gpt2(vocabulary=40).transformer, False, "encoder"),
    ],
    ids=["BertModel", "BertForMaskedLM", "GPT2LMHeadModel", "GPT2Model"],
)
def test_the_family_is_that_of_the_model_at_hand(build: Any, labelled: bool, family: str) -> None:
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens} if labelled else {"input_ids": tokens}
    (result,) = CompleteExperimentRunner(config_of(num_runs=1)).run_all(build(), [batch])
    assert (result.baseline_loss is None) == (family == "encoder")


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 16), ("float64", 64)])
def test_the_row_says_the_dtype_of_the_model_at_hand(dtype: str, width: int) -> None:
    model = micro_gpt2().to(getattr(torch, dtype))
    config = ExperimentConfig(num_runs=4, injection_location="out", **FAST)
    for result in CompleteExperimentRunner(config).run_all(model, BATCHES):
        assert len(result.bits_before) == 2 + width // 4
        assert result.dtype == dtype


def test_a_bit_that_the_model_at_hand_does_not_have_is_refused_before_the_first_run() -> None:
    model = micro_gpt2().to(torch.bfloat16)
    runner = CompleteExperimentRunner(config_of(injection_location="out", injection_bit=20))
    with pytest.raises(UsageError, match=r"bit: got 20, allowed 0\.\.15 for bfloat16"):
        runner.run_all(model, BATCHES)
    assert runner.records == []
    assert not is_patched(model)


class Loader:
    """A dataloader that may be asked again and again."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": tokens} for tokens in BATCHES)


@pytest.mark.parametrize(
    "loader",
    [Loader(), iter(BATCHES), tuple((tokens,) for tokens in BATCHES), DataLoader(BATCHES, batch_size=None)],
    ids=["iterable", "iterator", "tuples", "DataLoader"],
)
def test_all_that_yields_batches_is_a_dataloader(model: nn.Module, loader: Any) -> None:
    expected = CompleteExperimentRunner(config_of()).run_all(model, BATCHES)
    assert same(CompleteExperimentRunner(config_of()).run_all(model, loader), expected)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "dataloader: got no batches"),
        ([{"tokens": TOKENS[0]}], "allowed input_ids"),
        (["text"], "batch: got str"),
        ([TOKENS[0].float()], "input_ids: got float32"),
        ([TOKENS[0] + 1000], "input_ids: got the token id"),
        ([torch.zeros(1, 40, dtype=torch.int64)], "input_ids: got 40 tokens a sequence, allowed 32"),
        ([TOKENS[0], TOKENS[1][0]], "input_ids: got int64 of shape"),
    ],
)
def test_what_is_no_data_is_refused(model: nn.Module, loader: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompleteExperimentRunner(config_of()).run_all(model, loader)
    assert not is_patched(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_layers": 2}, r"fault\.layers: got 2, allowed 0\.\.1"),
        ({"injection_layers": [0, 7]}, r"fault\.layers: got 7, allowed 0\.\.1"),
        ({"injection_layer_pattern": "encoder"}, r"fault\.layer_pattern: 'encoder' matches no attention layer"),
        ({"fault": FaultConfig(index=IndexConfig(row=12))}, r"fault\.index\.row: got 12, allowed 0\.\.11"),
        ({"fault": FaultConfig(index=IndexConfig(head=2))}, r"fault\.index\.head: got 2, allowed 0\.\.1"),
        ({"fault": FaultConfig(location="q", index=IndexConfig(col=8))}, r"fault\.index\.col: got 8, allowed 0\.\.7"),
    ],
    ids=str,
)
def test_places_that_the_model_does_not_have_are_refused(
    model: nn.Module, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        CompleteExperimentRunner(config_of(**changes)).run_all(model, BATCHES)


@pytest.mark.parametrize("run_id", [-1, 4, "0" * 16, "3"])
def test_a_run_that_is_not_planned_is_refused(model: nn.Module, run_id: int | str) -> None:
    with pytest.raises(UsageError, match=r"run.id"):
        CompleteExperimentRunner(config_of()).run_single(run_id, model, BATCHES)


def test_a_model_or_data_that_is_swept_is_refused() -> None:
    for key, values in (("model.dtype", ["float32", "float64"]), ("data.seq_len", [8, 16])):
        with pytest.raises(UsageError, match=f"sweep.{key}: model and data are given to the runner"):
            CompleteExperimentRunner(config_of(sweep={key: values}))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match=r"family: got 'casual', .*did you mean 'causal'"):
        CompleteExperimentRunner(config_of(), family="casual")


# --------------------------------------------------------------------------------------------- detectors


@pytest.mark.parametrize("layers", ["injected", "all"])
def test_detections_name_every_layer_that_was_looked_at_and_the_output(layers: str) -> None:
    model = micro_gpt2(layers=3)
    # Behind the fault finite alone can fire.
    behind = {"injected": ("finite",), "all": ("finite", "s@w")}[layers]
    detect = DetectConfig(["finite", "s@w"], layers=layers)
    config = ExperimentConfig(num_runs=2, injection_location="scores", injection_layers=1, detect=detect)
    runner = CompleteExperimentRunner(config)
    for result, record in zip(runner.run_all(model, BATCHES), runner.records, strict=True):
        found = [(row.detector, row.layer, row.module) for row in record.detections]
        assert sorted(found, key=str) == sorted(
            [(detector, 1, "transformer.h.1.attn") for detector in ("finite", "s@w")]
            + [(detector, 2, "transformer.h.2.attn") for detector in behind]
            + [("finite", None, "output")],
            key=str,
        )
        assert {row.run_id for row in record.detections} == {result.run_id}
        assert result.num_violations == sum(row.violations for row in record.detections)


def test_looking_at_the_injected_layers_alone_misses_no_alarm() -> None:
    """The same runs are detected, by the same detectors at the layer of the fault; ``finite`` sees what overflows."""
    model, common = micro_gpt2(layers=3), {"injection_location": "v", "injection_layers": 0, "num_runs": 8}
    at_fault, everywhere = (
        CompleteExperimentRunner(
            ExperimentConfig(**common, sweep={"fault.bit": [3, 20, 29, 30]}, detect=DetectConfig(layers=layers))
        ).run_all(model, BATCHES)
        for layers in ("injected", "all")
    )
    assert {result.outcome for result in everywhere} >= {"benign", "critical", "nonfinite"}
    for one, other in zip(at_fault, everywhere, strict=True):
        assert (one.run_id, one.outcome, repr(one.loss_diff)) == (other.run_id, other.outcome, repr(other.loss_diff))
        assert one.violation_detected == other.violation_detected
        assert set(one.detectors.split(";")) <= set(other.detectors.split(";"))
        if not other.nonfinite:
            assert one.detectors == other.detectors


def test_oracles_are_reported_apart(model: nn.Module) -> None:
    config = config_of(detectors=["oracle_s@w"], injection_location="scores", injection_bit=29, num_runs=10)
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    assert any(result.oracle_detected for result in results)
    for result in results:
        assert (result.violation_detected, result.detectors, result.num_violations) == (False, "", 0)
        assert result.oracle_detectors == ("oracle_s@w" if result.oracle_detected else "")


def test_the_first_layer_of_a_pass_is_checked_against_the_truth(model: nn.Module) -> None:
    config = config_of(detectors=["s@w"], injection_location="weights", injection_bit=30, num_runs=30)
    results = CompleteExperimentRunner(config).run_all(model, BATCHES)
    assert all(result.violation_detected for result in results if result.outcome in ("critical", "nonfinite"))
    assert all(result.epsilon_margin is not None for result in results if not result.nonfinite)


def test_a_tolerance_is_added(model: nn.Module) -> None:
    common = {"injection_location": "weights", "injection_bit": 26, "num_runs": 20}
    strict, lax = (
        CompleteExperimentRunner(config_of(**common, detect=DetectConfig(["s@w"], tolerance=t))).run_all(model, BATCHES)
        for t in (0.0, 1e30)
    )
    assert sum(r.violation_detected for r in strict) > 0
    assert sum(r.violation_detected for r in lax if math.isfinite(r.value_after)) == 0


def test_a_detector_that_writes_into_what_it_looks_at_is_found_out(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FiniteDetector.judge

    def meddle(self: Any, state: Any, baseline: Any) -> Any:
        state.out.mul_(1.5)
        return real(self, state, baseline)

    monkeypatch.setattr(FiniteDetector, "judge", meddle)
    with pytest.raises(CheckRefusedError, match="control run"):
        CompleteExperimentRunner(config_of()).run_all(model, BATCHES)


def test_every_pass_leaves_a_line_in_the_trace(model: nn.Module, tmp_path: Any) -> None:
    with TraceWriter(tmp_path / "trace.jsonl") as trace:
        runner = CompleteExperimentRunner(config_of(num_runs=3), trace=trace)
        results = runner.run_all(model, BATCHES)
    text = (tmp_path / "trace.jsonl").read_text()
    for result in results:
        assert text.count(f'"fault:{result.fault_id}"') == 1


def test_the_model_section_is_not_loaded(model: nn.Module) -> None:
    config = config_of(model=ModelConfig(path="/nowhere/at/all"))
    assert len(CompleteExperimentRunner(config).run_all(model, BATCHES)) == 4
