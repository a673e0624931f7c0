"""Suites stand for their members, in order and once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bounds import list_detectors
from bounds.published.attnchecker import AttnCheckerDetector
from bounds.published.flash_abft import FlashAbftDetector
from bounds.published.ranger import RangerDetector
from bounds.published.realm import RealmDetector
from bounds.suites import SUITES, expand, suite_names

NAMES = st.lists(st.sampled_from([*list_detectors(), *SUITES]))


def test_suites_are_those_documented() -> None:
    assert expand(["lite"]) == ("finite", "P_q", "P_k", "P_v", "S_row", "W_sum", "W_simplex", "O_row")
    more = ("S_col", "W_elem", "O_col", "O_hull", "rng_q", "rng_k", "rng_v", "s_stat", "KV")
    assert expand(["full"]) == (*SUITES["lite"], *more)
    assert expand(["full-g4"]) == (*SUITES["full"], "P4_q", "P4_k", "P4_v", "O4_row", "S_tile")
    assert expand(["epsilon", "oracles"]) == ("s@w", "q@o", "comb", "oracle_s@w", "oracle_q@o", "oracle_comb")
    assert expand(["competitors"]) == ("attnchecker", "ranger", "realm", "flash_abft")
    assert expand(["fused"]) == ("lse_bounds", "lse_key", "fused_hull", "fused_norm", "fused_sum", "fused_kv")
    assert expand(["all"]) == list_detectors()
    assert expand([]) == ()


@given(NAMES)
def test_members_come_in_order_and_once(names: list[str]) -> None:
    flat = list(itertools.chain.from_iterable(SUITES.get(name, (name,)) for name in names))
    assert expand(names) == tuple(name for place, name in enumerate(flat) if name not in flat[:place])
    assert expand(expand(["competitors", "epsilon"])) == expand(["competitors", "epsilon"])


def test_a_suite_after_its_member_adds_the_others() -> None:
    assert expand(["realm", "competitors", "ranger"]) == ("realm", "attnchecker", "ranger", "flash_abft")


def test_an_unknown_name_shows_the_nearest_detector_or_suite() -> None:
    with pytest.raises(ValueError, match=r"detector: got 'finit', allowed .*finite.*; did you mean 'finite'\?"):
        expand(["lite", "finit"])
    with pytest.raises(ValueError, match=r"allowed .*lite, full, full-g4.*, all; did you mean 'competitors'\?"):
        expand(["competitor"])


def test_no_detector_has_the_name_of_a_suite() -> None:
    assert not set(suite_names()) & set(list_detectors())


@pytest.mark.parametrize("suite", SUITES)
def test_every_member_of_a_suite_is_registered(suite: str) -> None:
    missing = [name for name in SUITES[suite] if name not in list_detectors()]
    assert not missing


def test_competitors_are_what_they_are_called() -> None:
    classes = (AttnCheckerDetector, RangerDetector, RealmDetector, FlashAbftDetector)
    assert SUITES["competitors"] == tuple(detector.name for detector in classes)
    assert [detector.calibrated for detector in classes] == [False, True, True, True]
    assert not any(detector.proved for detector in classes)
