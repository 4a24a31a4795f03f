"""Filters against cases worked by hand, the published algorithm on an enumeration, and properties."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rehearsal.algorithms.filters import (
    FILTERS,
    DropConstant,
    Extremes,
    KeepAll,
    Kept,
    MinP,
    RandomLike,
    TopK,
    TopP,
    at_most,
    loss_scale,
    make_filter,
    most_groups,
    within_families,
)
from rehearsal.algorithms.variance import group_variance, has_variance, variance_mass
from rehearsal.errors import RecipeError

NAN = math.nan

# Variances 0, 1, 4 and 9 (deviations 0, 1, 2 and 3), and a group in which every episode failed.
HAND_PG = np.array([[5.0, 5.0], [0.0, 2.0], [-2.0, 2.0], [0.0, 6.0], [NAN, NAN]])

REWARDS = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 9), st.integers(1, 6)),
    elements=st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.0, 10.0, NAN]),
)  # fmt: skip

ALL = [
    KeepAll(), DropConstant(), TopK(0.5), TopK(2), TopK(3, include_constant=True), TopP(0.9), TopP(1.0),
    TopP(0.5, "deviation"), TopP(0.9, "softmax", include_constant=True), MinP(0.2), MinP(0.9, "deviation"),
    RandomLike(TopP(0.9)), Extremes(1, 1), Extremes(0, 2),
]  # fmt: skip


def kept(filter_: Any, rewards_PG: Any = HAND_PG) -> list[int]:
    return np.flatnonzero(filter_(rewards_PG).keep_P).tolist()


def test_variances_by_hand() -> None:
    np.testing.assert_allclose(group_variance(HAND_PG), [0, 1, 4, 9, 0])
    np.testing.assert_allclose(group_variance(HAND_PG, ddof=1), [0, 2, 8, 18, 0])
    np.testing.assert_allclose(group_variance([[1.0, NAN, 3.0], [4.0, NAN, NAN]]), [1, 0])
    np.testing.assert_allclose(variance_mass(HAND_PG, "deviation"), [0, 1, 2, 3, 0])
    soft = np.exp([0, math.sqrt(2), math.sqrt(8), math.sqrt(18), 0])
    np.testing.assert_allclose(variance_mass(HAND_PG, "softmax"), soft / soft.sum())


def test_equal_rewards_have_no_variance_at_all() -> None:
    # The mean of three times 0.1 is not 0.1, so a plain formula would find some.
    rewards_PG = [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1 + 1e-12]]
    assert group_variance(rewards_PG)[0] == 0.0
    assert group_variance(rewards_PG)[1] > 0.0
    assert kept(DropConstant(), rewards_PG) == [1]
    assert kept(TopP(0.9), rewards_PG) == [1]


def test_constant() -> None:
    assert kept(DropConstant()) == [1, 2, 3]
    assert DropConstant()(HAND_PG).reasons == (
        "dropped: all its rewards are equal", "kept: rewards differ", "kept: rewards differ", "kept: rewards differ",
        "dropped: none of its episodes has a reward",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("p", "mass", "expected"),
    [
        # Of a variance of 14, 9 are in group 3 and 13 in groups 2 and 3.
        (0.5, "variance", [3]),
        (9 / 14, "variance", [3]),
        (0.65, "variance", [2, 3]),
        (13 / 14, "variance", [2, 3]),
        (0.95, "variance", [1, 2, 3]),
        (1.0, "variance", [1, 2, 3]),
        # Of deviations of 6, 3 are in group 3.
        (0.5, "deviation", [3]),
        (0.51, "deviation", [2, 3]),
        (0.84, "deviation", [1, 2, 3]),
        (1.0, "deviation", [1, 2, 3]),
        # Softmax of 1.41, 2.83, 4.24: 0.045, 0.186, 0.768.
        (0.76, "softmax", [3]),
        (0.9, "softmax", [2, 3]),
        (0.96, "softmax", [1, 2, 3]),
    ],
)
def test_top_p_by_hand(p: float, mass: Any, expected: list[int]) -> None:
    assert kept(TopP(p, mass)) == expected


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        (TopK(1), [3]),
        (TopK(2), [2, 3]),
        (TopK(100), [1, 2, 3]),
        (TopK(4, include_constant=True), [0, 1, 2, 3]),
        (TopK(0.5), [2, 3]),  # of the four groups that have rewards
        (TopK(0.01), [3]),
        (TopK(0.99), [1, 2, 3]),
        (TopK(1.0), [1, 2, 3]),
        (TopK(1.0, include_constant=True), [0, 1, 2, 3]),
        (TopK(np.int64(2)), [2, 3]),
        (MinP(4 / 9), [2, 3]),
        (MinP(0.45), [3]),
        (MinP(0.3, "deviation"), [1, 2, 3]),
        (MinP(1.0), [3]),
    ],
)
def test_top_k_and_min_p_by_hand(filter_: Any, expected: list[int]) -> None:
    assert kept(filter_) == expected


def test_ties_go_to_the_groups_that_come_first() -> None:
    rewards_PG = np.array([[0.0, 1.0]] * 10)
    assert kept(TopK(3), rewards_PG) == [0, 1, 2]
    assert kept(TopP(0.9), rewards_PG) == list(range(9))
    assert kept(TopP(0.3), rewards_PG) == [0, 1, 2]  # three times a tenth is a little more than 0.3 in floats
    assert kept(MinP(1.0), rewards_PG) == list(range(10))
    # The same rewards in another order have the same variance, whatever the last digits say.
    shuffled_PG = np.array([[0.1, 0.2, 0.7], [0.7, 0.1, 0.2], [0.2, 0.7, 0.1]])
    assert kept(TopK(1), shuffled_PG) == [0]
    assert kept(MinP(1.0), shuffled_PG) == [0, 1, 2]


@pytest.mark.parametrize("filter_", ALL[1:], ids=str)
def test_a_batch_without_any_variance(filter_: Any) -> None:
    rewards_PG = np.ones((4, 3))
    expected = {TopK(3, include_constant=True): 3, TopP(0.9, "softmax", include_constant=True): 4}.get(filter_, 0)
    assert filter_(rewards_PG).keep_P.sum() == expected
    assert filter_(np.full((4, 3), NAN)).keep_P.sum() == 0
    assert filter_(np.empty((0, 3))).share == 1.0


@pytest.mark.parametrize("filter_", [TopP(0.9), TopP(1.0), TopP(1.0, "deviation"), MinP(0.2)], ids=str)
def test_what_has_no_mass_is_not_kept(filter_: Any) -> None:
    taking_part = dataclasses.replace(filter_, include_constant=True)
    assert taking_part(np.ones((4, 3))).keep_P.sum() == 0
    mixed_PG = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.5]])
    assert kept(taking_part, mixed_PG) == kept(filter_, mixed_PG)
    assert not taking_part(mixed_PG).keep_P[1]


def test_the_published_softmax_keeps_seven_or_eight_of_eight_groups() -> None:
    """8 groups of 16 binary rewards, every combination of group deviations: the strength of a softmax over raw
    deviations depends on the scale of the rewards, and on this one it hardly filters."""
    filter_ = TopP(0.9, "softmax", include_constant=True)
    levels = [np.array([1.0] * ones + [0.0] * (16 - ones)) for ones in range(9)]
    seen = set()
    for combination in itertools.combinations_with_replacement(range(9), 8):
        seen.add(int(filter_(np.stack([levels[ones] for ones in combination])).keep_P.sum()))
    assert seen == {7, 8}
    # With Sokoban's rewards, ten times as large, the same rule keeps few.
    sokoban_PG = 11.0 * np.stack([levels[ones] for ones in (0, 1, 2, 3, 4, 5, 6, 8)])
    assert filter_(sokoban_PG).keep_P.sum() <= 5
    # A share of the variance does not depend on the scale.
    assert kept(TopP(0.9), sokoban_PG) == kept(TopP(0.9), sokoban_PG / 11.0)


def test_the_published_threshold_drops_everything_where_rewards_are_small() -> None:
    """Its 0.01 is taken off the mass that is wanted; ours has no such number."""
    tiny_PG = 1e-6 * HAND_PG
    assert kept(TopP(0.9, "deviation"), tiny_PG) == kept(TopP(0.9, "deviation"))
    assert kept(TopP(0.9), tiny_PG) == kept(TopP(0.9))


@given(REWARDS, st.sampled_from(ALL))
@settings(max_examples=300, deadline=None)
def test_what_holds_for_every_filter(rewards_PG: np.ndarray, filter_: Any) -> None:
    found = filter_(rewards_PG)
    assert found.keep_PG.shape == rewards_PG.shape
    assert len(found.reasons) == len(rewards_PG)
    assert not (found.keep_PG & np.isnan(rewards_PG)).any()
    for keep, reason in zip(found.keep_P, found.reasons, strict=True):
        assert reason.startswith("kept" if keep else "dropped"), reason
    again = filter_(rewards_PG)
    assert np.array_equal(again.keep_PG, found.keep_PG)
    if not isinstance(filter_, Extremes):
        whole = found.keep_PG | np.isnan(rewards_PG) | ~found.keep_P[:, None]
        assert whole.all(), "groups are kept whole"


@given(REWARDS, st.sampled_from([TopK(0.5), TopK(2), TopP(0.9), TopP(0.5, "deviation"), MinP(0.2)]), st.data())
@settings(max_examples=200, deadline=None)
def test_variance_filters_keep_the_largest_whatever_the_scale(rewards_PG: Any, filter_: Any, data: Any) -> None:
    found = filter_(rewards_PG)
    variance_P = group_variance(rewards_PG)
    if found.keep_P.any() and (~found.keep_P).any():
        assert variance_P[found.keep_P].min() >= variance_P[~found.keep_P].max() * (1 - 1e-9)
    assert not (found.keep_P & ~has_variance(rewards_PG)).any()
    power = data.draw(st.integers(-20, 20))
    assert np.array_equal(filter_(rewards_PG * 2.0**power).keep_PG, found.keep_PG)


@given(REWARDS, st.floats(0.05, 1.0))
@settings(max_examples=200, deadline=None)
def test_top_p_keeps_no_more_than_it_needs(rewards_PG: np.ndarray, p: float) -> None:
    mass_P = group_variance(rewards_PG)
    keep_P = TopP(p)(rewards_PG).keep_P
    total = mass_P.sum()
    assert mass_P[keep_P].sum() >= p * total * (1 - 1e-9)
    if keep_P.any():
        assert mass_P[keep_P].sum() - mass_P[keep_P].min() < p * total * (1 + 1e-9)


def test_random_keeps_as_many_groups_as_the_other_and_no_failed_one() -> None:
    rng = np.random.default_rng(0)
    rewards_PG = np.vstack([rng.integers(0, 2, (20, 4)).astype(float), np.full((5, 4), NAN)])
    other = TopP(0.7)
    wanted = int(other(rewards_PG).keep_P.sum())
    drawn = np.zeros(25)
    for seed in range(400):
        found = RandomLike(other)(rewards_PG, np.random.default_rng(seed))
        assert found.keep_P.sum() == wanted
        drawn += found.keep_P
    assert (drawn[20:] == 0).all()
    # Groups without variance are drawn as often as others.
    expected = 400 * wanted / 20
    assert np.abs(drawn[:20] - expected).max() < 5 * math.sqrt(expected)


def test_random_keeps_as_many_episodes_as_the_other() -> None:
    rewards_PG = np.random.default_rng(3).random((9, 8))
    rewards_PG[2] = 0.5
    rewards_PG[4, 1:] = np.nan
    for other in (Extremes(1, 1), Extremes(3, 0)):
        kept = RandomLike(other)(rewards_PG, np.random.default_rng(0))
        wanted = other(rewards_PG)
        assert kept.keep_P.sum() == wanted.keep_P.sum()
        assert abs(int(kept.keep_PG.sum()) - int(wanted.keep_PG.sum())) <= 2, "but for a drawn group that has fewer"
        assert not (kept.keep_PG & np.isnan(rewards_PG)).any()


def test_environments_of_a_mixture_are_filtered_apart() -> None:
    # One pays ones, the other tens: by their variance all groups of the second come first.
    rng = np.random.default_rng(1)
    small, large = rng.integers(0, 2, (8, 6)).astype(float), 11.0 * rng.integers(0, 2, (8, 6))
    rewards_PG = np.stack([row for pair in zip(small, large, strict=True) for row in pair])
    families = [0, 1] * 8
    for filter_ in (TopP(0.9), TopK(0.5), MinP(0.5), RandomLike(TopK(0.5))):
        kept = within_families(filter_, rewards_PG, families, np.random.default_rng(0))
        rng_of_each = np.random.default_rng(0)
        alone = [filter_(rewards, rng_of_each) for rewards in (small, large)]
        assert kept.keep_P[0::2].tolist() == alone[0].keep_P.tolist()
        assert kept.keep_P[1::2].tolist() == alone[1].keep_P.tolist()
        assert kept.reasons[0::2] == alone[0].reasons
        assert kept.keep_P[0::2].sum() > 0
    together = within_families(TopP(0.9), rewards_PG, None, np.random.default_rng(0))
    assert together.keep_P.tolist() == TopP(0.9)(rewards_PG).keep_P.tolist()


def test_reasons_are_true_where_a_softmax_underflows() -> None:
    rewards_PG = np.array([[0.0, 1000.0], [0.0, 1.0], [5.0, 5.0]])
    everything = TopP(1.0, "softmax", include_constant=True)(rewards_PG)
    assert everything.keep_P.all()
    assert everything.reasons[2].endswith("(its rewards are all equal)")
    kept = TopP(0.9, "softmax")(rewards_PG)
    assert kept.keep_P.tolist() == [True, False, False]
    assert kept.reasons[1] == "dropped: number 2 by softmax, not of those that hold 90% of the softmax"
    assert kept.reasons[2] == "dropped: all its rewards are equal"


def test_extremes_keep_the_best_and_the_worst() -> None:
    rewards_PG = np.array([[3.0, 1.0, NAN, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, NAN, NAN]])
    found = Extremes(top=1, bottom=2)(rewards_PG)
    assert found.keep_PG.tolist() == [
        [False, True, False, True, True], [False] * 5, [True, True, False, False, False],
    ]  # fmt: skip
    assert Extremes(top=2, bottom=0)(rewards_PG).keep_PG[0].tolist() == [True, False, False, False, True]


def test_no_more_than_a_step_needs() -> None:
    found = at_most(DropConstant()(HAND_PG), 2)
    assert np.flatnonzero(found.keep_P).tolist() == [1, 2]
    assert found.reasons[3] == "dropped: the step has enough groups without it"
    assert np.array_equal(at_most(found, 5).keep_PG, found.keep_PG)


def test_most_groups() -> None:
    assert [most_groups(one) for one in (TopK(3), RandomLike(TopK(3)))] == [3, 3]
    assert {most_groups(one) for one in (TopK(1.0), TopK(0.5), TopP(), RandomLike(), Extremes(), KeepAll())} == {None}


def test_loss_scaling() -> None:
    quarter = Kept(np.array([[True], [False], [False], [False]]), np.ones((4, 1), dtype=bool), ("",) * 4)
    assert [loss_scale(quarter, scaling, 4) for scaling in ("none", "share", "sqrt")] == [1.0, 0.25, 0.5]


def test_the_kept_share_is_one_of_episodes() -> None:
    rewards_PG = np.tile(np.arange(8.0), (4, 1))
    extremes = Extremes(1, 1)(rewards_PG)
    assert (extremes.share, loss_scale(extremes, "share", 4)) == (0.25, 0.25)
    # Two of the four groups of which anything has a reward are kept, and so are two of their eight episodes.
    mixed = extremes.of(np.array([0, 2]))
    assert (mixed.share, len(mixed.reasons), mixed.keep_PG.shape) == (0.25, 2, (2, 8))


def test_what_failed_was_not_filtered() -> None:
    rewards_PG = np.tile([0.0, 1.0, NAN, NAN], (4, 1))
    rewards_PG[2:] = NAN
    for filter_ in (KeepAll(), DropConstant(), TopP(1.0)):
        found = filter_(rewards_PG)
        assert (found.share, loss_scale(found, "share", 4)) == (1.0, 1.0)
    rewards_PG[1, 1] = 0.0
    half = within_families(DropConstant(), rewards_PG, [0, 1, 0, 1], np.random.default_rng(0))
    assert half.share == half.share_of_step(4) == 0.5
    assert half.of(np.array([1, 3])).share == 0.0
    assert KeepAll()(np.full((4, 3), NAN)).share == 1.0


def test_a_step_is_measured_by_the_groups_that_it_was_to_have() -> None:
    alive, dead, failed = [0.0, 1.0, 1.0, NAN], [1.0, 1.0, 1.0, 1.0], [NAN] * 4
    refilled = at_most(DropConstant()(np.array([dead, alive, failed, alive, dead, alive, alive])), 3)
    assert refilled.share == 9 / 20
    assert refilled.share_of_step(3) == 1.0
    assert [loss_scale(refilled, scaling, 3) for scaling in ("none", "share", "sqrt")] == [1.0, 1.0, 1.0]
    # One group is missing, and in its place stands one that was turned down.
    short = DropConstant()(np.array([failed, dead, alive, dead, alive]))
    assert short.share_of_step(3) == 6 / 10
    extremes = Extremes(1, 1)(np.array([dead, alive, alive]))
    assert extremes.share_of_step(2) == 4 / 6


def test_filters_by_name() -> None:
    assert make_filter("none") == KeepAll()
    assert make_filter("top_p", p=0.8, mass="softmax") == TopP(0.8, "softmax")
    assert make_filter("top_k", k=4) == TopK(4)
    assert make_filter("random", like="top_k", k=0.25) == RandomLike(TopK(0.25))
    assert make_filter("random") == RandomLike(TopP())
    for name in FILTERS:
        assert make_filter(name)(HAND_PG).keep_PG.shape == HAND_PG.shape


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_q", {}, "There is no filter 'top_q'; there are none, constant, top_k"),
        ("top_p", {"q": 1}, "The filter top_p has no option 'q'; there are p, mass, include_constant"),
        ("none", {"p": 1}, "The filter none has no option 'p'; it has none"),
        ("top_p", {"p": 0}, "p of a top_p filter must lie above 0"),
        ("top_p", {"p": 1.5}, "at most at 1, not 1.5"),
        ("top_p", {"mass": "weight"}, "There is no mass 'weight'"),
        ("top_p", {"p": "0.9"}, "Option p of the filter top_p must be a number"),
        ("top_p", {"include_constant": 1}, "must be true or false"),
        ("min_p", {"p": -1}, "p of a min_p filter"),
        ("top_k", {"k": 1.5}, "k of a top_k filter"),
        ("top_k", {"k": 4.0}, "such as 4, or a share of them with a point, above 0.0 and up to 1.0, not 4.0"),
        ("top_k", {"k": 0}, "k of a top_k filter"),
        ("top_k", {"k": 0.0}, "k of a top_k filter"),
        ("top_k", {"k": True}, "must be a number"),
        ("extremes", {"top": 0, "bottom": 0}, "at least one episode of a group: set top or bottom to 1 or more"),
        ("extremes", {"top": -1}, "^top of an extremes filter must be a number of episodes from 0 on, not -1"),
        ("extremes", {"bottom": -2}, "^bottom of an extremes filter"),
        ("random", {"like": "none"}, "^A random filter like none would keep everything: name the filter"),
        ("random", {"like": None}, "^A random filter like none would keep everything: name the filter"),
        ("random", {"like": 3}, "must be the name of another filter, not 3"),
        ("extremes", {"top": 1.5}, "must be a whole number"),
        ("random", {"like": "random"}, "some other filter"),
        ("random", {"like": "nothing"}, "There is no filter 'nothing'"),
    ],
)
def test_wrong_names_and_values(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_filter(name, **options)
