"""Which layers a run injects into."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fault_injection import LAYER_MODES, candidate_layers, choose_layers

NAMES = [f"{side}.block.{i}.attention" for side in ("encoder", "decoder") for i in range(3)]


def key(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def test_all_layers_are_candidates_unless_told_otherwise() -> None:
    assert candidate_layers(NAMES) == [0, 1, 2, 3, 4, 5]


def test_given_layers_are_sorted_and_distinct() -> None:
    assert candidate_layers(NAMES, layers=[4, 0, 4]) == [0, 4]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"decoder", [3, 4, 5]),
        (r"block\.[02]\.", [0, 2, 3, 5]),
        (r"^encoder.*1\.attention$", [1]),
        (r"", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_pattern_is_searched_in_the_names(pattern: str, expected: list[int]) -> None:
    assert candidate_layers(NAMES, pattern=pattern) == expected


def test_layers_and_a_pattern_must_agree() -> None:
    assert candidate_layers(NAMES, layers=[0, 4, 5], pattern="decoder") == [4, 5]
    with pytest.raises(ValueError, match=r"fault\.layer_pattern: 'decoder' matches no attention layer"):
        candidate_layers(NAMES, layers=[0, 1], pattern="decoder")


def test_a_pattern_without_a_match_lists_the_nearest_names() -> None:
    with pytest.raises(
        ValueError, match=r"'dekoder\\\\\.block\\\\\.1' matches no attention layer; the nearest are decoder"
    ) as refusal:
        candidate_layers(NAMES, pattern=r"dekoder\.block\.1")
    nearest = str(refusal.value).split("nearest are ")[1].split(", ")
    assert "decoder.block.1.attention" in nearest
    assert set(nearest) <= set(NAMES)


def test_a_pattern_like_no_name_still_lists_some() -> None:
    with pytest.raises(ValueError, match=r"the nearest are \w+\.block\.\d\.attention, "):
        candidate_layers(NAMES, pattern="ZZZ")


def test_a_bad_expression_is_refused_with_its_fault() -> None:
    with pytest.raises(ValueError, match=r"fault\.layer_pattern: 'h\.\(1' is no regular expression: missing \)"):
        candidate_layers(NAMES, pattern="h.(1")


@pytest.mark.parametrize("layer", [6, -1, 100])
def test_a_layer_that_does_not_exist_is_refused_with_the_range(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"fault\.layers: got {layer}, allowed 0\.\.5"):
        candidate_layers(NAMES, layers=[0, layer])


def test_an_empty_list_is_not_every_layer() -> None:
    with pytest.raises(ValueError, match=r"fault\.layers: got an empty list; leave it out to mean every layer"):
        candidate_layers(NAMES, layers=[])


def test_first_all_and_specific_ignore_the_generator() -> None:
    for seed in range(5):
        assert choose_layers([2, 3, 5], "first", key(seed)) == (2,)
        assert choose_layers([2, 3, 5], "all", key(seed)) == (2, 3, 5)
        assert choose_layers([2, 3, 5], "specific", key(seed)) == (2, 3, 5)


def test_random_is_one_uniform_candidate_determined_by_the_key() -> None:
    drawn = [choose_layers([2, 3, 5], "random", key(seed)) for seed in range(3000)]
    assert drawn == [choose_layers([2, 3, 5], "random", key(seed)) for seed in range(3000)]
    counts = Counter(drawn)
    assert set(counts) == {(2,), (3,), (5,)}
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 2 + 6 * 2


def test_an_unknown_mode_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"fault\.layer_mode: got 'specfic', allowed first, all, random, specific; did you mean 'specific'\?",
    ):
        choose_layers([0], "specfic", key(0))
    assert all(choose_layers([0], mode, key(0)) == (0,) for mode in LAYER_MODES)


@pytest.mark.parametrize("mode", LAYER_MODES)
def test_no_candidates_are_refused(mode: str) -> None:
    # An empty choice would be a run without a fault.
    with pytest.raises(ValueError, match=r"layer"):
        choose_layers([], mode, key(0))
