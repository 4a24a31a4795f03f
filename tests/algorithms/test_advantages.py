"""Advantage estimators: worked by hand, against plain loops, and under every kind of missing reward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.algorithms import advantages, has_variance

NAN = float("nan")
GROUP_ESTIMATORS = [advantages.grpo, advantages.dr_grpo, advantages.rloo]


def groups_of_rewards(min_groups=1):
    reward = st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1e3, 1e3))
    shape = st.tuples(st.integers(min_groups, 5), st.integers(1, 7))
    return shape.flatmap(
        lambda pg: st.lists(st.lists(reward, min_size=pg[1], max_size=pg[1]), min_size=pg[0], max_size=pg[0]).map(
            np.array
        )
    )


def test_grpo_by_hand():
    # mean 1, deviations -1 1 0 0, unbiased variance 2/3
    got = advantages.grpo([[0.0, 2.0, 1.0, 1.0]], eps=0.0)
    np.testing.assert_allclose(got, np.array([[-1, 1, 0, 0]]) / np.sqrt(2 / 3))


def test_grpo_adds_eps_to_the_deviation():
    np.testing.assert_allclose(advantages.grpo([[0.0, 2.0]], eps=1.0), np.array([[-1, 1]]) / (np.sqrt(2) + 1))


def test_dr_grpo_and_rloo_by_hand():
    np.testing.assert_allclose(advantages.dr_grpo([[0.0, 2.0, 4.0]]), [[-2, 0, 2]])
    np.testing.assert_allclose(advantages.rloo([[0.0, 2.0, 4.0]]), [[-3, 0, 3]])


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_missing_rewards_are_left_out_of_the_baseline(estimator):
    """A failed episode is not a zero: the others' advantages are those of the group without it."""
    got = estimator([[1.0, NAN, 3.0, NAN, 5.0]])
    assert got[0, [1, 3]].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(got[:, [0, 2, 4]], estimator([[1.0, 3.0, 5.0]]))
    assert not np.allclose(got[:, [0, 2, 4]], estimator([[1.0, 0.0, 3.0, 0.0, 5.0]])[:, [0, 2, 4]])


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("rewards", [[[7.0]], [[NAN, 7.0, NAN]], [[NAN, NAN]], [[0.1] * 7], [[1e-200] * 3]])
def test_groups_with_nothing_to_compare_give_exactly_zero(estimator, rewards):
    assert not estimator(rewards).any()


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_infinite_rewards_are_refused(estimator):
    with pytest.raises(ValueError, match="infinite"):
        estimator([[1.0, np.inf]])
    with pytest.raises(ValueError, match="two dimensions"):
        estimator([1.0, 2.0])


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@given(rewards_PG=groups_of_rewards(), data=st.data())
def test_group_estimators_are_finite_centred_and_blind_to_order(estimator, rewards_PG, data):
    got = estimator(rewards_PG)
    assert np.isfinite(got).all()
    assert not got[np.isnan(rewards_PG)].any()
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-6 * (1 + np.abs(got).max()))
    order = np.array(data.draw(st.permutations(range(rewards_PG.shape[1]))))
    np.testing.assert_allclose(estimator(rewards_PG[:, order]), got[:, order], rtol=1e-6, atol=1e-9)
    rows = np.array(data.draw(st.permutations(range(rewards_PG.shape[0]))))
    np.testing.assert_array_equal(estimator(rewards_PG[rows]), got[rows])


@given(
    scale=st.sampled_from([1e-100, 1e-3, 0.5, 3.0, 1e100]),
    shift=st.sampled_from([-10.0, 0.0, 1.0]),
)
def test_grpo_without_eps_ignores_scale_and_shift(scale, shift):
    rewards_PG = np.array([[0.0, 1.0, 0.25, NAN], [1.0, 1.0, 0.0, 0.0]])
    expected = advantages.grpo(rewards_PG, eps=0.0)
    np.testing.assert_allclose(advantages.grpo(rewards_PG * scale, eps=0.0), expected)
    np.testing.assert_allclose(advantages.grpo(rewards_PG + shift, eps=0.0), expected, rtol=1e-12)


def test_the_other_estimators_keep_the_scale_and_ignore_the_shift():
    rewards_PG = np.array([[0.0, 1.0, 0.25, NAN]])
    for estimator in (advantages.dr_grpo, advantages.rloo):
        np.testing.assert_allclose(estimator(rewards_PG * 3), estimator(rewards_PG) * 3)
        np.testing.assert_allclose(estimator(rewards_PG + 5), estimator(rewards_PG))


@given(groups_of_rewards())
def test_rloo_is_the_reward_less_the_mean_of_the_others(rewards_PG):
    got = advantages.rloo(rewards_PG)
    for row, group in enumerate(rewards_PG):
        for column, reward in enumerate(group):
            others = np.delete(group, column)
            others = others[~np.isnan(others)]
            if not np.isnan(reward) and len(others):
                assert got[row, column] == pytest.approx(reward - others.mean(), abs=1e-9)


@given(groups_of_rewards())
def test_a_group_has_variance_just_when_some_advantage_is_not_zero(rewards_PG):
    np.testing.assert_array_equal(has_variance(rewards_PG), (advantages.dr_grpo(rewards_PG) != 0).any(axis=1))


def test_has_variance_is_exact():
    rewards_PG = [[0.1, 0.1, 0.1], [1e-12, 0.0, 0.0], [NAN, NAN, NAN], [NAN, 3.0, NAN], [NAN, 3.0, 2.0], [-1.0] * 3]
    assert has_variance(rewards_PG).tolist() == [False, True, False, False, True, False]
    assert has_variance(np.empty((0, 4))).tolist() == []
    assert has_variance(np.empty((2, 0))).tolist() == [False, False]


def test_whiten_by_hand():
    got = advantages.whiten([1.0, 2.0, 3.0, 100.0], [True, True, True, False])
    np.testing.assert_allclose(got, [-1, 0, 1, 98], rtol=1e-7)
    np.testing.assert_array_equal(advantages.whiten([0.1, 0.1, 0.1]), [0, 0, 0])
    np.testing.assert_array_equal(advantages.whiten([5.0]), [0])
    np.testing.assert_array_equal(advantages.whiten([5.0], [False]), [5])


# Sequential estimators ------------------------------------------------------------------------------------------------


def slow_gae(rewards, values, gamma, lam):
    """One episode, the textbook's loop."""
    result = [0.0] * len(rewards)
    following_value, carry = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * following_value - values[t]
        carry = delta + gamma * lam * carry
        result[t], following_value = carry, values[t]
    return result


def masked_gae(rewards, values, sampled, gamma, lam):
    """One row with tokens that were not sampled: value and residual are carried through them unchanged."""
    result = [0.0] * len(rewards)
    following_value, carry = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        if sampled[t]:
            delta = rewards[t] + gamma * following_value - values[t]
            carry = delta + gamma * lam * carry
            following_value = values[t]
        result[t] = carry
    return result


def slow_bi_level(turn_rewards, turn_values, gamma, lam, turn_gamma):
    """One episode, as published, with explicit turn ends: a list of values for each turn."""
    ends = [values[-1] for values in turn_values]
    turn_level = slow_gae(turn_rewards, ends, turn_gamma, lam)
    result = []
    for advantage, values in zip(turn_level, turn_values, strict=True):
        target = advantage + values[-1]
        carry, tokens = 0.0, []
        for i in reversed(range(len(values))):
            last = i == len(values) - 1
            delta = (target if last else 0.0) + (0.0 if last else gamma * values[i + 1]) - values[i]
            carry = delta + gamma * lam * carry
            tokens.append(carry)
        result.extend(reversed(tokens))
    return result


EPISODES = st.lists(
    st.lists(st.tuples(st.floats(-2, 2), st.lists(st.floats(-3, 3), min_size=1, max_size=5)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)
DISCOUNTS = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@given(EPISODES, DISCOUNTS, DISCOUNTS)
def test_gae_equals_the_plain_loop(episodes, gamma, lam):
    rewards, values, lengths, expected = [], [], [], []
    for episode in episodes:
        episode_values = [value for _, turn in episode for value in turn]
        episode_rewards = [r if i == len(turn) - 1 else 0.0 for r, turn in episode for i in range(len(turn))]
        rewards += episode_rewards
        values += episode_values
        lengths.append(len(episode_values))
        expected += slow_gae(episode_rewards, episode_values, gamma, lam)
    got, returns = advantages.gae(rewards, values, lengths, gamma, lam)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(returns, np.array(expected) + values, atol=1e-12)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 3), st.booleans()), min_size=1, max_size=12), DISCOUNTS)
def test_leaving_out_observations_equals_carrying_through_them(tokens, lam):
    rewards = [r if sampled else 0.0 for r, _, sampled in tokens]
    values = [v for _, v, _ in tokens]
    sampled = [s for _, _, s in tokens]
    carried = masked_gae(rewards, values, sampled, 0.9, lam)
    kept = np.flatnonzero(sampled)
    got, _ = advantages.gae(np.array(rewards)[kept], np.array(values)[kept], [len(kept)], 0.9, lam)
    np.testing.assert_allclose(got, np.array(carried)[kept], atol=1e-12)


@given(EPISODES, DISCOUNTS, DISCOUNTS, DISCOUNTS)
def test_bi_level_gae_equals_the_plain_loop(episodes, gamma, lam, turn_gamma):
    expected = []
    for episode in episodes:
        turns = [turn for _, turn in episode]
        expected += slow_bi_level([r for r, _ in episode], turns, gamma, lam, turn_gamma)
    values = [value for episode in episodes for _, turn in episode for value in turn]
    got, returns = advantages.bi_level_gae(
        [r for episode in episodes for r, _ in episode],
        values,
        [len(turn) for episode in episodes for _, turn in episode],
        [len(episode) for episode in episodes],
        gamma,
        lam,
        turn_gamma,
    )
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(returns, np.array(expected) + values, atol=1e-12)


def test_bi_level_gae_keeps_turns_of_zero_reward_apart():
    """The published code reads turn ends off non-zero rewards: a zero merges two turns, a zero at the end crashes."""
    values = [0.5, 0.5, 0.5, 0.5]
    got, _ = advantages.bi_level_gae([0.0, 0.0], values, [2, 2], [2], gamma=1.0, lam=0.0, turn_gamma=0.5)
    # Turn 2: 0 - 0.5. Turn 1: 0 + 0.5 * 0.5 - 0.5. First tokens: V(next) - V = 0, lam = 0.
    np.testing.assert_allclose(got, [0.0, -0.25, 0.0, -0.5])


def test_bi_level_gae_does_not_leak_past_a_turn_end():
    base = ([1.0, 1.0], [0.1, 0.2, 0.3, 0.4], [2, 2], [2])
    got, _ = advantages.bi_level_gae(*base, gamma=1.0, lam=1.0, turn_gamma=0.0)
    changed, _ = advantages.bi_level_gae([1.0, 9.0], [0.1, 0.2, 7.0, 8.0], [2, 2], [2], 1.0, 1.0, 0.0)
    np.testing.assert_array_equal(got[:2], changed[:2])
    with pytest.raises(ValueError, match="at least one"):
        advantages.bi_level_gae([1.0, 1.0], [0.1, 0.2], [2, 0], [2], 1.0, 1.0, 1.0)


def test_returns_to_go_by_hand():
    got = advantages.returns_to_go([0, 0, 1, 0, 2, 3], [3, 3], 0.5)
    np.testing.assert_allclose(got, [0.25, 0.5, 1, 1.75, 3.5, 3])


def test_suffix_sums_refuses_runs_that_do_not_cover():
    with pytest.raises(ValueError, match="do not cover"):
        advantages.suffix_sums([1.0, 2.0], [1], 1.0)


@given(st.lists(st.integers(0, 4), max_size=6), DISCOUNTS)
def test_suffix_sums_of_runs_of_any_length(lengths, factor):
    values = np.arange(1.0, sum(lengths) + 1)
    got = advantages.suffix_sums(values, lengths, factor)
    start = 0
    for length in lengths:
        carry = 0.0
        for t in reversed(range(start, start + length)):
            carry = values[t] + factor * carry
            assert got[t] == pytest.approx(carry)
        start += length
