"""Sites: what a survey notes, and that elements are drawn uniformly among the visible ones."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import ZOO

from fault_injection import ElementIndex, Site, SiteSurvey, patched, tapped
from fault_injection.faults.site import AXES, visible_keys

SHAPE = (2, 3, 4, 5)
DRAWS = 6000


def key(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def site(visible: Tensor | None = None, shape: tuple[int, int, int, int] = SHAPE, columns: int = 0) -> Site:
    return Site(1, "h.1.attn", "scores", shape, columns or shape[-1], torch.float32, visible)


def causal(rows: int = 4, columns: int = 5) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)


MASKS = {
    "no mask": None,
    "causal, shared by batch and heads": causal()[None, None],
    "causal, shared by heads": causal().expand(2, 1, 4, 5).clone(),
    "padded, shared by heads": causal().expand(2, 1, 4, 5)
    & (torch.arange(5) != torch.tensor([[0], [9]]))[:, None, None],
    "one row for all queries": torch.tensor([True, False, True, True, False])[None, None, None],
    "each head its own": torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.4,
}


def drawable(mask: Tensor | None, partial: ElementIndex, *, include_masked: bool = False) -> list[tuple[int, ...]]:
    """List by brute force what may be drawn."""
    visible = torch.ones(SHAPE, dtype=torch.bool) if mask is None or include_masked else mask.expand(SHAPE)
    return [
        index
        for index in product(*map(range, SHAPE))
        if visible[index] and all(g is None or g == i for g, i in zip(partial.as_tuple(), index, strict=True))
    ]


def chi_square(counts: Counter[Any], cells: list[Any]) -> float:
    expected = sum(counts.values()) / len(cells)
    return sum((counts[cell] - expected) ** 2 / expected for cell in cells)


def limit(cells: int) -> float:
    """Six standard deviations above the mean of a chi-square variable with ``cells - 1`` degrees of freedom."""
    freedom = max(cells - 1, 1)
    return freedom + 6 * (2 * freedom) ** 0.5


# -------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "partial", [ElementIndex(), ElementIndex(row=2), ElementIndex(batch=1, head=0, col=2)], ids=str
)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_draws_are_uniform_over_the_visible_elements_that_agree(mask: Tensor | None, partial: ElementIndex) -> None:
    cells = drawable(mask, partial)
    random = key(5)
    where = site(mask)
    counts = Counter(where.draw(partial, random, include_masked=False) for _ in range(DRAWS))
    assert set(counts) <= set(cells)
    assert chi_square(counts, cells) < limit(len(cells))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_elements_are_drawn_on_request(mask: Tensor | None) -> None:
    cells = drawable(mask, ElementIndex(), include_masked=True)
    random = key(6)
    counts = Counter(site(mask).draw(ElementIndex(), random, include_masked=True) for _ in range(DRAWS))
    assert chi_square(counts, cells) < limit(len(cells)) == limit(120)


def test_the_chi_square_limit_rejects_a_draw_by_row_and_column() -> None:
    # Drawing a row and then one of its keys favours early keys; the test above must notice.
    random = key(5)
    cells = drawable(MASKS["causal, shared by heads"], ElementIndex(batch=0, head=0))
    counts = Counter((0, 0, row := int(random.integers(4)), int(random.integers(row + 2))) for _ in range(DRAWS))
    assert chi_square(counts, cells) > 2 * limit(len(cells))


def test_a_draw_is_determined_by_the_key() -> None:
    where = site(MASKS["padded, shared by heads"])

    def drawn(seed: int) -> list[Any]:
        random = key(seed)
        return [where.draw(ElementIndex(), random, include_masked=False) for _ in range(20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len({tuple(drawn(seed)) for seed in range(50)}) == 50


def test_draws_are_plain_integers() -> None:
    for mask in MASKS.values():
        assert {type(i) for i in site(mask).draw(ElementIndex(), key(1), include_masked=False)} == {int}


@pytest.mark.parametrize("mask", [MASKS["causal, shared by heads"], MASKS["causal, shared by batch and heads"]])
def test_an_index_that_leaves_only_hidden_keys_is_kept(mask: Tensor) -> None:
    where = site(mask)
    complete = ElementIndex(1, 2, 0, 4)
    assert where.draw(complete, key(0), include_masked=False) == (1, 2, 0, 4)
    assert not where.sees((1, 2, 0, 4))
    partial = where.draw(ElementIndex(row=0, col=4), key(0), include_masked=False)
    assert partial[2:] == (0, 4)
    assert not where.sees(partial)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sees_agrees_with_the_expanded_mask(mask: Tensor | None) -> None:
    full = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask.expand(SHAPE)
    assert all(site(mask).sees(index) == bool(full[index]) for index in product(*map(range, SHAPE)))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("beyond", [True, False])
@pytest.mark.parametrize("include_masked", [True, False])
def test_a_coordinate_that_does_not_exist_is_refused_with_the_range(
    axis: int, beyond: bool, include_masked: bool
) -> None:
    value = SHAPE[axis] if beyond else -1
    message = rf"fault\.index\.{AXES[axis]}: got {value}, allowed 0\.\.{SHAPE[axis] - 1} for scores of layer 1"
    for mask in MASKS.values():
        with pytest.raises(IndexError, match=message):
            site(mask).draw(ElementIndex(**{AXES[axis]: value}), key(0), include_masked=include_masked)


def test_columns_limit_what_can_be_hit_but_not_the_layout() -> None:
    where = site(None, columns=3)
    assert where.extent == (2, 3, 4, 3)
    random = key(2)
    assert {where.draw(ElementIndex(), random, include_masked=True)[3] for _ in range(300)} == {0, 1, 2}
    assert where.flat((1, 2, 3, 2)) == np.arange(120).reshape(SHAPE)[1, 2, 3, 2]
    with pytest.raises(IndexError, match=r"fault\.index\.col: got 3, allowed 0\.\.2"):
        where.draw(ElementIndex(col=3), random, include_masked=True)


# ------------------------------------------------------------------------------------------------------ surveys


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"q": (2, 4, 12, 8), "k": (2, 4, 12, 8), "v": (2, 4, 12, 8), "out": (2, 4, 12, 8)}),
        ("llama-gqa", {"q": (2, 4, 12, 8), "k": (2, 2, 12, 8), "v": (2, 2, 12, 8), "out": (2, 4, 12, 8)}),
        ("deepseek_v3", {"q": (2, 4, 12, 10), "k": (2, 4, 12, 10), "v": (2, 4, 12, 6), "out": (2, 4, 12, 6)}),
        ("bloom", {"q": (2, 4, 12, 8), "k": (2, 4, 12, 8), "v": (2, 4, 12, 8), "out": (2, 4, 12, 8)}),
        ("gpt_oss", {"scores": (2, 4, 12, 12), "weights": (2, 4, 12, 13)}),
    ],
)
def test_shapes_are_canonical(name: str, expected: dict[str, Any], zoo_model: Any, survey_of: Any) -> None:
    model, scores = zoo_model(name), (2, 4, 12, 12)
    with patched(model):
        sites = survey_of(model, ZOO[name].inputs(model)).sites()
    wanted = {"scores": scores, "weights": scores} | expected
    for layer, (location, shape) in product(range(2), wanted.items()):
        assert sites[layer, location].shape == shape, (layer, location)


def test_cross_attention_has_its_own_shapes(zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model("whisper")
    with patched(model):
        sites = survey_of(model, ZOO["whisper"].inputs(model)).sites()
    # Encoder 12 frames, decoder 7 tokens; cores are numbered in the order of evaluation.
    rows_and_keys = [sites[layer, "scores"].shape[2:] for layer in range(6)]
    assert rows_and_keys == [(12, 12)] * 2 + [(7, 7), (7, 12)] * 2
    assert [sites[layer, "scores"].module for layer in (3, 4)] == [
        "model.decoder.layers.0.encoder_attn",
        "model.decoder.layers.1.self_attn",
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "scores", "weights"),
    [
        ("llama", torch.float16, torch.float16, torch.float32),
        ("llama", torch.bfloat16, torch.bfloat16, torch.float32),
        ("bert", torch.float16, torch.float16, torch.float16),
        ("gptj", torch.bfloat16, torch.float32, torch.float32),
        ("mpt", torch.float16, torch.float16, torch.float32),
        ("gpt_oss", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_are_the_native_ones(
    name: str, dtype: torch.dtype, scores: torch.dtype, weights: torch.dtype, zoo_model: Any, survey_of: Any
) -> None:
    model = zoo_model(name, dtype)
    with patched(model):
        survey = survey_of(model, ZOO[name].inputs(model))
    assert survey.site(0, "scores").dtype == scores
    assert survey.site(0, "weights").dtype == weights
    assert survey.site(0, "v").dtype == dtype


def expected_visible(name: str, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Build the mask of a decoder from integers: causality, the layer's window, padding."""
    queries, keys = torch.arange(12)[:, None], torch.arange(12)
    visible = (keys <= queries).expand(2, 1, 12, 12)
    windows = {"mistral": (4, 4), "gemma2": (4, None), "gpt_oss": (4, None), "gpt_neo": (None, 4)}
    window = windows.get(name, (None, None))[layer]
    if window is not None:
        visible = visible & (queries - keys < window)
    if "attention_mask" in inputs:
        visible = visible & inputs["attention_mask"].bool()[:, None, None]
    return visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "gpt2-padded",
        "llama-left-padded",
        "mistral",
        "gemma2",
        "gpt_oss",
        "gpt_neo",
        "gptj",
        "bloom-padded",
        "falcon-alibi-padded",
        "falcon-rotary",
        "mpt-padded",
        "gpt2-upcast",
    ],
)
def test_visible_keys_are_causality_window_and_padding(
    name: str, dtype: torch.dtype, zoo_model: Any, survey_of: Any
) -> None:
    model = zoo_model(name, dtype)
    inputs = ZOO[name].inputs(model)
    with patched(model):
        survey = survey_of(model, inputs)
    for layer in range(2):
        visible = survey.site(layer, "scores").visible
        assert visible is not None
        assert torch.equal(visible.expand(2, 1, 12, 12), expected_visible(name, inputs, layer)), layer


@pytest.mark.parametrize(("name", "keys"), [("t5-padded", 8), ("bert-padded", 8), ("vit", 10)])
def test_encoders_see_every_key_but_padding(name: str, keys: int, zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model(name)
    with patched(model):
        visible = survey_of(model, ZOO[name].inputs(model)).site(0, "weights").visible
    assert visible is not None
    assert set(visible[1].sum(-1).flatten().tolist()) == {keys}
    assert bool(visible[0].all())


def test_a_learned_sink_is_no_key(zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model("gpt_oss")
    with patched(model):
        survey = survey_of(model, ZOO["gpt_oss"].inputs(model))
    weights = survey.site(0, "weights")
    assert (weights.shape[-1], weights.columns, survey.visible[0, 0].shape[-1]) == (13, 12, 13)
    random = key(4)
    drawn = [weights.draw(ElementIndex(), random, include_masked=True) for _ in range(500)]
    assert {index[3] for index in drawn} == set(range(12))
    assert weights.flat((1, 3, 11, 11)) == 2 * 4 * 12 * 13 - 2


def test_a_survey_can_be_limited_to_layers_and_refuses_what_it_has_not_seen(zoo_model: Any) -> None:
    model = zoo_model("gpt2")
    survey = SiteSurvey(torch.float32, layers=[1])
    with patched(model), torch.no_grad(), tapped(model, survey):
        model(**ZOO["gpt2"].inputs(model))
    assert {layer for layer, _ in survey.sites()} == {1}
    with pytest.raises(KeyError):
        survey.site(0, "scores")


def test_layers_with_one_mask_share_its_memory(zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model("gpt2")
    with patched(model):
        survey = survey_of(model, ZOO["gpt2"].inputs(model))
    assert survey.visible[0, 0] is survey.visible[1, 0]
    assert survey.visible[0, 0].shape == (2, 1, 12, 12)


def test_a_survey_notes_the_first_evaluation_and_the_masks_of_all(zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model("qwen2_vl")
    inputs = ZOO["qwen2_vl"].inputs(model)
    with patched(model, example_inputs=inputs):
        survey = survey_of(model, inputs)
    # The images have 4 x 4 and 4 x 6 patches.
    assert survey.site(0, "scores").shape == (1, 4, 16, 16)
    assert {call: mask.shape[-1] for (layer, call), mask in survey.visible.items() if layer == 0} == {0: 16, 1: 24}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("gpt2", True),
        ("llama-left-padded", True),
        ("gpt2-inverse-layer", True),
        ("opt", True),
        ("mpt", False),
        ("bloom", False),
        ("falcon-alibi", False),
        ("gemma2", False),
        ("t5", False),
        ("gpt_oss", False),
    ],
)
def test_plain_logits_are_scaled_scores_and_nothing_else(
    name: str, plain: bool, zoo_model: Any, survey_of: Any
) -> None:
    model = zoo_model(name)
    with patched(model):
        survey = survey_of(model, ZOO[name].inputs(model))
    assert survey.plain_logits[0, 0] is plain


def test_visible_keys_tell_a_hidden_key_from_a_small_or_broken_logit() -> None:
    lowest = torch.finfo(torch.float16).min
    logits = torch.tensor([[[[0.0, -1e4, float("nan"), float("inf"), lowest, float("-inf"), lowest / 2]]]])
    assert visible_keys(logits, torch.float16).flatten().tolist() == [True] * 4 + [False] * 3
    wide = visible_keys(logits, torch.float32)
    assert wide.flatten().tolist() == [True] * 5 + [False, True]


def test_visible_keys_keep_heads_apart_only_where_they_differ() -> None:
    logits = torch.zeros(2, 3, 4, 4)
    assert visible_keys(logits, torch.float32).shape == (2, 1, 4, 4)
    logits[1, 2, 3, 0] = float("-inf")
    visible = visible_keys(logits, torch.float32)
    assert visible.shape == (2, 3, 4, 4)
    assert (~visible).nonzero().tolist() == [[1, 2, 3, 0]]
