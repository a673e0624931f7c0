"""The atlas: predictions against really injected faults, against a fault at a time in float64, and the command."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_states import attend, random_state
from scipy.stats import rankdata, spearmanr
from transformers import AutoModelForCausalLM
from zoo import ZOO

from bounds.atlas import command as atlas_command
from bounds.atlas.flips import every_flip
from bounds.atlas.layers import compute_atlas, layer_atlas, score_map
from bounds.atlas.states import ObservedCall, observe
from bounds.atlas.statistics import FlipStatistics, Ranking
from bounds.core.row_check import RowCheck
from bounds.effects.certificate import FaultChecks, certify
from bounds.effects.fault_effect import LOCATIONS, local_effect
from bounds.effects.flips import Flips, flipped
from bounds.effects.head_terms import head_terms
from bounds.effects.head_view import LogitMap
from fault_injection import FaultSpec, SiteSurvey, draw_fault, injected, patched, tapped

REFERENCE = str(Path(__file__).parents[3] / "experiments" / "reference_models" / "reference")
TEXT = b"def attention(query, key, value):\n    scores = query @ key.mT\n    return softmax(scores) @ value\n\n\n"


def reference_model():
    return AutoModelForCausalLM.from_pretrained(REFERENCE, attn_implementation="eager").eval()


def reference_ids(length=64):
    return torch.tensor([[byte + 3 for byte in (TEXT * 3)[:length]]])


class Recorder:
    """Keeps what one layer computes."""

    locations = frozenset({"q", "k", "v", "scores", "logits", "weights", "mass", "out"})

    def __init__(self, layer):
        self.layers = frozenset({layer})
        self.kept = {}

    def on(self, location, tensor, call):
        self.kept.setdefault(location, tensor.detach().clone())


def faulty_state(model, inputs, clean, fault):
    """Inject ``fault``; return the layer's state in the faulty pass and the model's logits."""
    recorder = Recorder(fault.layer)
    with torch.no_grad(), injected(model, [fault]), tapped(model, recorder):
        logits = model(**inputs).logits
    kept = recorder.kept
    names = {"query": "q", "key": "k", "value": "v"}
    fields = {name: kept[names.get(name, name)] for name in (*names, "logits", "weights", "mass", "out", "scores")}
    return dataclasses.replace(clean, **fields), logits


def rounding_of_both(clean, faulty, location):
    """(B, H, T): what rounding may set two passes apart beyond the closed form, from the proof of T26 with no error."""
    keys = clean.key.shape[:3]
    nothing = {}
    for name in LOCATIONS:
        zero = torch.zeros(keys if name in ("k", "v") else clean.rows, dtype=torch.float64)
        nothing[name] = RowCheck(zero, zero)
    bounds = [certify(state, FaultChecks(**nothing)).bounds[location] for state in (clean, faulty)]
    return bounds[0] + bounds[1] + 1e-300


def drawn_faults(model, inputs, layer, location, count, seed, **spec):
    survey = SiteSurvey(next(model.parameters()).dtype)
    with torch.no_grad(), tapped(model, survey):
        model(**inputs)
    random = np.random.Generator(np.random.Philox(key=seed))
    return [draw_fault(FaultSpec(location, **spec), survey.site(layer, location), random) for _ in range(count)]


def after_of(state, fault):
    tensor = getattr(state, {"q": "query", "k": "key", "v": "value"}.get(fault.location, fault.location))
    return float(flipped(tensor[fault.index].reshape(1), fault.bits[0]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("reference", "gpt2", "llama-gqa", "gpt_oss", "gemma2", "mpt")]
    + [(name, torch.float64) for name in ("reference", "gpt2", "llama-gqa")],
    ids=str,
)
def test_T20_to_T25_agree_with_injection(name, dtype):
    """The layer's real output moves as predicted, to within the rounding of two passes (in float64: 1e-12)."""
    if name == "reference":
        model, inputs = reference_model().to(dtype), {"input_ids": reference_ids()}
    else:
        model = ZOO[name].build().to(dtype)
        inputs = ZOO[name].inputs(model)
    largest, closest, runs = 0.0, 0.0, 0
    with patched(model):
        (call,) = observe(model, inputs, [1])
        for number, location in enumerate(LOCATIONS):
            for fault in drawn_faults(model, inputs, 1, location, 10, seed=number):
                after = after_of(call.state, fault)
                if not abs(after) <= 1e15:
                    continue
                faulty, _ = faulty_state(model, inputs, call.state, fault)
                predicted = local_effect(call.state, location, fault.index, after, call.logit_map)
                real = faulty.out.double() - call.state.out.double()
                error = (predicted - real).norm(dim=-1)
                unit = 1 + predicted.abs().max() + call.state.value.abs().max().double()
                # llama computes its softmax in float32, whatever the model's format
                if call.state.weights.dtype == torch.float64:
                    assert float(error.max() / unit) < 1e-12, fault
                else:
                    allowed = rounding_of_both(call.state, faulty, location) + 2.0**-23 * real.norm(dim=-1)
                    assert bool((error <= allowed).all()), fault
                    closest = max(closest, float((error / allowed).max()))
                largest, runs = max(largest, float(error.max() / unit)), runs + 1
    print(
        f"\n{name} {dtype}: {runs} faults, largest error {largest:.1e} of 1 + |v|max + |do|, {closest:.3f} of allowed"
    )
    assert runs > 45


SITUATIONS = {
    "causal": {"kv_heads": 2},
    "window": {"mask": "window", "gain": 5.0},
    "padded": {"mask": "padded"},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 0.0]), "kv_heads": 1},
    "cap": {"cap": 3.0, "gain": 2.0},
    "cast": {"dtype": torch.bfloat16, "softmax_dtype": torch.float32},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_atlas_agrees_with_one_fault_at_a_time(situation):
    """Every number of the blockwise sweep against the closed form of a single fault, written out."""
    state = random_state(2, rows=7, keys=7, channels=6, **SITUATIONS[situation])
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(state.out.shape, generator=generator, dtype=torch.float64)
    logit_map = LogitMap(state.scaling, SITUATIONS[situation].get("cap"))
    length = state.out.double().norm(dim=-1)
    noise = torch.stack([torch.stack([head_terms(state, gradient, b, h).noise for h in range(4)]) for b in range(2)])
    compared = 0
    for flips in every_flip(state, gradient, logit_map):
        if flips.bit % 5 != 4 and flips.bit < 20:
            continue
        finite = (flips.counted & ~flips.nonfinite).nonzero()
        if not len(finite):
            continue
        row, column = finite[int(torch.randint(len(finite), (1,), generator=generator))].tolist()
        index = (*flips.origin, row, column)
        effect = local_effect(
            state, flips.location.removeprefix("masked "), index, float(flips.after[row, column]), logit_map
        )
        moved = effect.norm(dim=-1)
        expected = {
            "effect": effect.norm(),
            "relative": torch.where(moved == 0, 0.0, moved / length).max(),
            "noise_ratio": (effect.abs() / noise).max(),
            "loss": (effect * gradient).sum(),
        }
        for field, value in expected.items():
            got = getattr(flips, field)[row, column]
            scale = expected["effect"] * gradient.norm() if field == "loss" else value.abs()
            assert abs(float(got - value)) <= 1e-9 * float(scale) + 1e-300, (flips.location, flips.bit, field)
            compared += 1
    assert compared > 1000


def test_every_visible_element_and_bit_is_counted_once():
    state = random_state(1, kv_heads=2)
    atlas = layer_atlas(ObservedCall(state, torch.ones_like(state.out), LogitMap(state.scaling)), top=3)
    visible = int(state.visible.expand(state.logits.shape).sum())
    expected = {
        "q": state.query.numel(),
        "k": state.key.numel(),
        "v": state.value.numel(),
        "scores": visible,
        "weights": visible,
        "masked weights": state.weights.numel() - visible,
        "out": state.out.numel(),
    }
    for location, elements in expected.items():
        assert [atlas.statistics[location, bit].flips for bit in range(32)] == [elements] * 32
    assert len(atlas.ranking) == 3
    assert atlas.ranking[0].effect > 1e30  # a weight or value with its highest exponent bit set


def test_P1_masked_weights_act_only_through_bit_30():
    """Zero with a bit set is at most 2^-63 but for bit 30, where it is 2; the sign bit gives -0."""
    state = random_state(4)
    atlas = layer_atlas(ObservedCall(state, torch.ones_like(state.out), LogitMap(state.scaling)))
    shares = {bit: atlas.statistics["masked weights", bit] for bit in range(32)}
    assert all(entry.noise_level == entry.flips for bit, entry in shares.items() if bit != 30)
    assert shares[30].noise_level == 0
    assert shares[29].largest_relative < 2.0**-55


def test_P2_scores_of_vanished_weight_change_no_bit():
    """Beyond delta = 104 the exponential is 0 in float32: the output is bitwise the same before and after."""
    generator = torch.Generator().manual_seed(5)
    scores, value = torch.randn(1, 1, 6, 8, generator=generator), torch.randn(1, 1, 8, 4, generator=generator)
    scores[..., 3] -= 200.0
    clean = torch.softmax(scores, -1) @ value
    for bit in range(24):
        changed = scores.clone()
        changed[..., 3] = flipped(scores[..., 3], bit)
        if bool((changed.amax(-1) - changed[..., 3] > 104).all()):
            assert torch.equal(torch.softmax(changed, -1) @ value, clean)


def test_P3_a_wrong_row_maximum_cancels():
    """Softmax subtracts the maximum for range alone: any other number of that size gives the same weights."""
    a = torch.randn(5, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for wrong in (-3.0, 0.5, 40.0):
        shifted = torch.exp(a - (a.amax(-1, keepdim=True) + wrong))
        assert torch.allclose(shifted / shifted.sum(-1, keepdim=True), torch.softmax(a, -1), rtol=1e-13)


def test_P4_noise_level_flips_do_nothing_when_they_are_injected():
    """A sample of the flips that are proved to be noise is run: the output moves by rounding, the loss by nothing."""
    model, inputs = reference_model(), {"input_ids": reference_ids()}
    ids = inputs["input_ids"]
    losses, noise, checked = [], 0.0, 0
    with patched(model):
        (call,) = observe(model, inputs, [2])
        with torch.no_grad():
            clean = loss_of(model(**inputs).logits, ids)
        by_head = [head_terms(call.state, call.gradient, 0, head) for head in range(call.state.rows[1])]
        bound = torch.stack([terms.noise for terms in by_head])[None]
        for location in LOCATIONS:
            for fault in drawn_faults(model, inputs, 2, location, 12, seed=7, bits="mantissa"):
                effect = local_effect(call.state, location, fault.index, after_of(call.state, fault), call.logit_map)
                if float((effect.abs() / bound).max()) > 1:
                    continue
                faulty, logits = faulty_state(model, inputs, call.state, fault)
                noise = max(noise, float(((faulty.out - call.state.out).abs() / bound).max()))
                losses.append(abs(loss_of(logits, ids) - clean))
                checked += 1
    print(f"\n{checked} noise-level flips run: largest |d out| / noise {noise:.2f}, largest |d loss| {max(losses):.1e}")
    assert checked > 15
    assert max(losses) < 1e-5


def loss_of(logits, ids):
    return float(F.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))


def test_ranking_finds_the_critical_faults():
    """Predicted |loss change| against the real one: the area under the curve for critical faults, per location."""
    model, inputs = reference_model(), {"input_ids": reference_ids(32)}
    ids = inputs["input_ids"]
    with patched(model), torch.no_grad():
        calls = observe(model, inputs)
        clean = loss_of(model(**inputs).logits, ids)
        areas = {}
        for number, location in enumerate(LOCATIONS):
            predicted, real = [], []
            for layer, call in enumerate(calls):
                faults = drawn_faults(model, inputs, layer, location, 8, seed=100 + number)
                for fault in faults + drawn_faults(model, inputs, layer, location, 8, seed=number, bits="exponent"):
                    after = after_of(call.state, fault)
                    if not abs(after) <= 1e15:
                        continue
                    with injected(model, [fault]):
                        real.append(abs(loss_of(model(**inputs).logits, ids) - clean))
                    effect = local_effect(call.state, location, fault.index, after, call.logit_map)
                    predicted.append(abs(float((effect * call.gradient.double()).sum())))
            critical = np.array(real) > 1e-3
            ranks = rankdata(predicted)
            hits, others = critical.sum(), (~critical).sum()
            areas[location] = (ranks[critical].sum() - hits * (hits + 1) / 2) / (hits * others)
            print(
                f"\n{location}: {len(real)} faults, {hits} critical, AUC {areas[location]:.4f}, "
                f"Spearman {spearmanr(predicted, real).statistic:.3f}",
                end="",
            )
    assert min(areas.values()) > 0.95


@pytest.mark.parametrize("name", ["reference", "llama-gqa"])
def test_nonfinite_predictions_come_true(name):
    """Exponent flips of every location: the output is NaN or Inf exactly where that was predicted."""
    model = reference_model() if name == "reference" else ZOO[name].build()
    inputs = {"input_ids": reference_ids(24)} if name == "reference" else ZOO[name].inputs(model)
    agreed = {True: 0, False: 0}
    with patched(model):
        (call,) = observe(model, inputs, [0])
        top_bit = (flips for flips in every_flip(call.state, call.gradient, call.logit_map) if flips.bit == 30)
        for flips in top_bit:
            if flips.location == "masked weights" or flips.origin[0] > 0:
                continue
            for wanted in (True, False):
                places = (flips.counted & (flips.nonfinite == wanted)).nonzero()[:2].tolist()
                for row, column in places:
                    fault = fault_at(model, inputs, flips.location, (*flips.origin, row, column))
                    faulty, _ = faulty_state(model, inputs, call.state, fault)
                    assert bool(torch.isfinite(faulty.out).all()) != wanted, fault
                    agreed[wanted] += 1
    assert min(agreed.values()) > 5


def fault_at(model, inputs, location, index):
    (fault,) = drawn_faults(model, inputs, 0, location, 1, seed=0, bits=(30,))
    site_shape = fault.shape
    element = dataclasses.replace(fault.elements[0], flat=int(np.ravel_multi_index(index, site_shape)))
    return dataclasses.replace(fault, index=index, elements=(element,))


def test_logit_maps_are_found():
    """Bias, cap, sink, factor inside the product: what a model does to its scores is recognised without its name."""
    expected = {
        "gpt2": (None, False),
        "bloom": (None, False),
        "mpt": (None, True),
        "gemma2": (3.0, True),
        "gpt_oss": (None, True),
        "falcon-rotary": (None, False),
    }
    for name, (cap, biased) in expected.items():
        model = ZOO[name].build()
        with patched(model):
            for call in observe(model, ZOO[name].inputs(model)):
                assert call.logit_map is not None, name
                assert (call.logit_map.cap, call.state.has_bias_or_cap) == (cap, biased), name
    model = ZOO["gemma2"].build()
    with patched(model):
        model.config.attn_logit_softcapping = None  # the cap is still applied, but nobody says so
        calls = observe(model, ZOO["gemma2"].inputs(model), [0])
    assert calls[0].logit_map is None
    atlas = layer_atlas(calls[0])
    assert set(atlas.reasons) == {"q", "k", "scores"}
    assert {location for location, _ in atlas.statistics} == {"v", "weights", "masked weights", "out"}


def test_gradients_are_those_of_the_loss():
    model, inputs = reference_model(), {"input_ids": reference_ids(16)}
    ids = inputs["input_ids"]
    with patched(model):
        (call,) = observe(model, inputs, [1])
        step, index = 1e-2, (0, 2, 7, 5)

        class Nudge:
            locations, layers = frozenset({"out"}), frozenset({1})

            def __init__(self, size):
                self.size = size

            def on(self, location, tensor, call):
                changed = tensor.clone()
                changed[index] += self.size
                return changed

        losses = []
        for size in (step, -step):
            with torch.no_grad(), tapped(model, Nudge(size)):
                losses.append(loss_of(model(**inputs).logits, ids))
    slope = (losses[0] - losses[1]) / (2 * step)
    assert math.isclose(slope, float(call.gradient[index]), rel_tol=2e-2)


def test_score_map_is_the_largest_of_all_heads():
    state = random_state(6, rows=6, keys=6)
    call = ObservedCall(state, torch.randn(state.out.shape, generator=torch.Generator().manual_seed(1)), LogitMap(0.25))
    got = score_map(call, 25)
    largest = torch.zeros(6, 6, dtype=torch.float64)
    for flips in every_flip(state, call.gradient, call.logit_map, ["scores"]):
        if flips.bit == 25:
            largest = torch.maximum(largest, torch.where(flips.counted & ~flips.nonfinite, flips.loss.abs(), 0.0))
    hidden = ~torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(got.isnan(), hidden)
    assert torch.equal(got[~hidden], largest[~hidden])


def test_statistics_are_those_of_the_numbers():
    generator = torch.Generator().manual_seed(7)
    sizes = 10 ** (20 * torch.rand(40, 50, generator=generator, dtype=torch.float64) - 15)
    bad = torch.rand(40, 50, generator=generator) < 0.1
    counted = torch.rand(40, 50, generator=generator) < 0.7
    flips = Flips("v", 1, (0, 0), sizes, sizes, sizes, sizes, sizes, -sizes, bad, counted)
    statistics = FlipStatistics()
    statistics.add(flips)
    kept = sizes[counted & ~bad]
    assert (statistics.flips, statistics.nonfinite) == (int(counted.sum()), int((counted & bad).sum()))
    assert statistics.noise_level == int((kept <= 1).sum())
    assert statistics.largest_loss == float(kept.max())
    for share in (0.1, 0.5, 0.99):
        exact = float(kept.sort().values[int(share * len(kept))])
        assert abs(math.log10(statistics.loss_quantile(share) / exact)) <= 1 / 64 + 1e-9
    twice = FlipStatistics()
    twice.join(statistics)
    twice.join(statistics)
    assert twice.flips == 2 * statistics.flips
    assert twice.relative_quantile(0.5) == statistics.relative_quantile(0.5)
    assert math.isnan(FlipStatistics().loss_quantile(0.5))
    ranking = Ranking(5, layer=3)
    ranking.add(flips)
    ranking.add(flips)
    assert [flip.loss for flip in ranking.worst()][::2] == [-value for value in kept.sort(descending=True).values[:3]]


def test_a_row_of_zeros_that_nothing_moves_is_unchanged():
    state = attend(*(torch.zeros(1, 1, 3, 2) for _ in range(3)))
    atlas = layer_atlas(ObservedCall(state, torch.zeros_like(state.out), LogitMap(1.0)))
    assert atlas.statistics["scores", 10].largest_relative == 0.0
    assert atlas.statistics["out", 29].largest_relative == math.inf


def run(capsys, *arguments):
    status = atlas_command.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_prints_tables_and_ranking(capsys):
    status, out, _ = run(capsys, REFERENCE, "--layer", "1", "--seq-len", "12", "--top", "4")
    assert status == 0
    assert "12 tokens, a built-in sample text through ByT5Tokenizer" in out
    assert "layer 1 (transformer.h.1.attn)" in out
    assert out.count("exponent") == 7
    assert len([line for line in out.splitlines() if " -> " in line]) == 4


def test_command_writes_table_and_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "atlas"
    status, _, _ = run(capsys, REFERENCE, "--layer", "0", "--seq-len", "8", "--output", str(folder))
    assert status == 0
    assert sorted(path.name for path in folder.iterdir()) == ["atlas.csv", "atlas.png"]
    with (folder / "atlas.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 7 * 32
    assert {row["field"] for row in rows} == {"sign", "exponent", "mantissa"}
    assert (folder / "atlas.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such-folder"], r"MODEL: got './no-such-folder', which is no folder here and no name on the hub"),
        ([REFERENCE, "--layer", "4"], r"layer: got 4, allowed 0..3"),
        ([REFERENCE, "--seq-len", "1"], r"--seq-len: got 1, allowed 2 or more"),
        ([REFERENCE, "--seq-len", "300"], r"--seq-len: got 300, allowed 2..256 for this model"),
        ([REFERENCE, "--tokens", "5 6 7"], r"--seq-len: got 64, but there are only 3 tokens \(ids as given\)"),
        ([REFERENCE, "--tokens", "5,x"], r"--tokens: got '5,x', allowed numbers"),
        ([REFERENCE, "--tokens", "5,9999999", "--seq-len", "2"], r"--tokens: got 9999999, allowed 0..\d+"),
        ([REFERENCE, "--text", "/no/such/file"], r"--text: cannot read '/no/such/file'"),
        ([REFERENCE, "--top", "-1"], r"--top: got -1, allowed 0 or more"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


def test_a_picture_without_matplotlib_is_refused_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err = run(capsys, REFERENCE, "--output", str(tmp_path / "o"))
    assert (status, out) == (2, "")
    assert "atlas.png needs matplotlib" in err
    assert not (tmp_path / "o").exists()


def test_compute_atlas_refuses_what_it_cannot_read():
    model = reference_model()
    with patched(model), pytest.raises(ValueError, match="input_ids of at least two tokens"):
        compute_atlas(model, {"input_ids": torch.tensor([[5]])})
    encoder = ZOO["vit"].build()
    with patched(encoder), pytest.raises(ValueError, match="input_ids of at least two tokens"):
        compute_atlas(encoder, ZOO["vit"].inputs(encoder))
