"""From rewards of episodes to advantages of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.algorithms import ESTIMATORS, SequenceRewards, advantages, preset, token_advantages
from rehearsal.algorithms.presets import CRITIC_ESTIMATORS

NAN = float("nan")


def describe_step(episodes, groups, samples):
    """A step from ``{(group, sample): [sequence, ...]}``, a sequence being [(turn, "s" or "o" for each token), ...].

    Turn t of an episode has the reward 10 * group + sample + t / 10, or NaN for the whole episode if its key has a
    third entry.
    """
    rewards_PG = np.full((groups, samples), NAN)
    columns = {name: [] for name in ("group", "sample", "sampled", "turns", "sequence", "turn_rewards")}
    for key, sequences in episodes.items():
        n_turns = 1 + max(turn for sequence in sequences for turn, _ in sequence)
        turn_rewards = np.array([10.0 * key[0] + key[1] + t / 10 for t in range(n_turns)])
        if len(key) == 2:
            rewards_PG[key] = turn_rewards.sum()
        for sequence in sequences:
            number = len(columns["group"])
            columns["group"].append(key[0])
            columns["sample"].append(key[1])
            columns["turn_rewards"].append(turn_rewards)
            for turn, marks in sequence:
                columns["turns"] += [turn] * len(marks)
                columns["sampled"] += [mark == "s" for mark in marks]
                columns["sequence"] += [number] * len(marks)
    return SequenceRewards(
        rewards_PG=rewards_PG,
        sequence_group_S=np.array(columns["group"], dtype=np.int64),
        sequence_sample_S=np.array(columns["sample"], dtype=np.int64),
        sampled_N=np.array(columns["sampled"], dtype=bool),
        turns_N=np.array(columns["turns"], dtype=np.int64),
        sequence_N=np.array(columns["sequence"], dtype=np.int64),
        turn_rewards=columns["turn_rewards"],
    )


def small_step():
    return describe_step(
        {
            (0, 0): [[(0, "oss"), (1, "oos")]],
            (0, 1): [[(0, "os")], [(1, "oss"), (2, "os")]],
            (1, 0): [[(0, "oss")]],
            (1, 1, "failed"): [[(0, "oss")]],
        },
        groups=2,
        samples=2,
    )


def with_values(step, seed=0):
    step.values_N = np.random.default_rng(seed).normal(size=len(step.sampled_N))
    return step


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_sampled_tokens_of_scored_episodes_have_an_advantage(estimator):
    step = with_values(small_step())
    advantages_N, returns_N = token_advantages(preset("grpo", advantage=estimator), step)
    assert advantages_N.dtype == np.float32
    assert advantages_N.shape == (len(step.sampled_N),)
    assert np.isfinite(advantages_N).all()
    silent = ~step.sampled_N | (step.sequence_N == 4)
    assert not advantages_N[silent].any()
    assert advantages_N[~silent].any()
    assert (returns_N is not None) == (estimator in CRITIC_ESTIMATORS)
    if returns_N is not None:
        assert np.isnan(returns_N[silent]).all()
        assert np.isfinite(returns_N[~silent]).any()


def test_group_estimators_give_all_segments_of_an_episode_the_same():
    step = small_step()
    advantages_N, _ = token_advantages(preset("dr_grpo"), step)
    # Episode rewards 0 + 0.1 = 0.1 and 1 + 1.1 + 1.2 = 3.3; the group of one scored episode gives nothing.
    expected = {0: -1.6, 1: 1.6, 2: 1.6, 3: 0.0, 4: 0.0}
    for sequence, value in expected.items():
        chosen = advantages_N[(step.sequence_N == sequence) & step.sampled_N]
        np.testing.assert_allclose(chosen, value, rtol=1e-6)


def test_an_episode_counts_once_in_its_baseline_however_many_segments_it_has():
    whole = describe_step({(0, 0): [[(0, "os")]], (0, 1): [[(0, "os"), (1, "os"), (2, "os")]]}, 1, 2)
    cut = describe_step({(0, 0): [[(0, "os")]], (0, 1): [[(0, "os")], [(1, "os")], [(2, "os")]]}, 1, 2)
    for estimator in ESTIMATORS:
        algorithm = preset("grpo", advantage=estimator, gamma=0.9)
        first, _ = token_advantages(algorithm, with_values(whole))
        second, _ = token_advantages(algorithm, with_values(cut))
        np.testing.assert_array_equal(first, second)


def test_an_episode_without_a_sampled_token_is_left_out_of_the_baseline():
    """Nothing was sampled in it (the first observation filled the context, say): it is no sample of the policy."""
    step = describe_step({(0, 0): [[(0, "os")]], (0, 1): [[(0, "os")]], (0, 2): [[(0, "oo")]]}, 1, 3)
    advantages_N, _ = token_advantages(preset("dr_grpo"), step)
    np.testing.assert_allclose(advantages_N, [0, -0.5, 0, 0.5, 0, 0])


def test_reward_sits_on_the_last_sampled_token_of_its_turn():
    step = describe_step({(0, 0): [[(0, "osso"), (1, "oos")]]}, 1, 1)
    step.turn_rewards = [np.array([1.0, 2.0])]
    got, _ = token_advantages(preset("reinforce_pp", gamma=0.5, whiten=False), step)
    np.testing.assert_allclose(got, [0, 1.0, 2.0, 0, 0, 0, 2.0])  # 1 + 0.5 * 2 at the turn's last token
    got, _ = token_advantages(
        preset("reinforce_pp", turn_gamma=0.5, gamma=0.1, discount_unit="turn", whiten=False), step
    )
    np.testing.assert_allclose(got, [0, 2.0, 2.0, 0, 0, 0, 2.0])


def test_gae_by_hand_across_a_turn_boundary():
    step = describe_step({(0, 0): [[(0, "os"), (1, "oss")]]}, 1, 1)
    step.turn_rewards = [np.array([1.0, 2.0])]
    step.values_N = np.array([99.0, 0.5, 99.0, 0.25, 0.75])
    got, returns_N = token_advantages(preset("ppo", gamma=0.9, lam=0.5, whiten=False), step)
    last = 2 - 0.75
    middle = 0.9 * 0.75 - 0.25 + 0.45 * last
    first = 1 + 0.9 * 0.25 - 0.5 + 0.45 * middle
    np.testing.assert_allclose(got, [0, first, 0, middle, last], rtol=1e-6)
    np.testing.assert_allclose(returns_N[[1, 3, 4]], [first + 0.5, middle + 0.25, 2.0], rtol=1e-6)


def test_turn_gae_by_hand():
    step = describe_step({(0, 0): [[(0, "oss"), (1, "oss")]]}, 1, 1)
    step.turn_rewards = [np.array([1.0, 2.0])]
    step.values_N = np.array([99.0, 0.5, 99.0, 99.0, 0.25, 99.0])
    got, returns_N = token_advantages(preset("ppo", advantage="turn_gae", turn_gamma=0.9, lam=0.5, whiten=False), step)
    second = 2 - 0.25
    first = 1 + 0.9 * 0.25 - 0.5 + 0.45 * second
    np.testing.assert_allclose(got, [0, first, first, 0, second, second], rtol=1e-6)
    np.testing.assert_allclose(returns_N, [NAN, first + 0.5, NAN, NAN, 2.0, NAN], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["reinforce_pp", *CRITIC_ESTIMATORS])
def test_a_turn_without_sampled_tokens_passes_its_reward_on(estimator):
    """The context filled up before an answer: the reward of that turn is still part of the episode."""
    with_gap = describe_step({(0, 0): [[(0, "os"), (1, "oo"), (2, "os"), (3, "o")]]}, 1, 1)
    with_gap.turn_rewards = [np.array([1.0, 2.0, 4.0, 8.0])]
    moved = describe_step({(0, 0): [[(0, "os"), (1, "oo"), (2, "os"), (3, "o")]]}, 1, 1)
    moved.turn_rewards = [np.array([3.0, 0.0, 12.0, 0.0])]
    algorithm = preset("ppo", advantage=estimator, gamma=0.9, whiten=False)
    first, _ = token_advantages(algorithm, with_values(with_gap))
    second, _ = token_advantages(algorithm, with_values(moved))
    np.testing.assert_array_equal(first, second)


def test_undiscounted_returns_keep_the_sum_of_the_rewards():
    step = small_step()
    got, _ = token_advantages(preset("reinforce_pp", whiten=False), step)
    for sequence, episode in ((0, (0, 0)), (1, (0, 1)), (3, (1, 0))):
        first = np.flatnonzero(step.sampled_N & (step.sequence_N == sequence))[0]
        assert got[first] == pytest.approx(step.rewards_PG[episode])


def test_whitening_is_over_scored_sampled_tokens_that_the_policy_learns_from():
    step = small_step()
    step.policy_S = np.array([True, True, True, False, True])
    raw, _ = token_advantages(preset("reinforce_pp", whiten=False), step)
    got, _ = token_advantages(preset("reinforce_pp"), step)
    included = step.sampled_N & (step.sequence_N <= 2)
    assert got[included].mean() == pytest.approx(0, abs=1e-6)
    assert got[included].std(ddof=1) == pytest.approx(1, rel=1e-5)
    outside = step.sampled_N & (step.sequence_N == 3)
    np.testing.assert_allclose(got[outside], (raw[outside] - raw[included].mean()) / raw[included].std(ddof=1), 1e-5)
    assert not got[step.sequence_N == 4].any()


def test_reinforce_pp_baseline_whitens_group_centred_rewards_over_tokens():
    step = small_step()
    got, _ = token_advantages(preset("grpo", advantage="reinforce_pp_baseline"), step)
    centred, _ = token_advantages(preset("dr_grpo"), step)
    scored = step.sampled_N & (step.sequence_N != 4)
    np.testing.assert_allclose(got[scored], advantages.whiten(centred[scored]), rtol=1e-5)


def test_overlong_penalty_counts_all_sampled_tokens_of_the_episode():
    step = describe_step({(0, 0): [[(0, "os")]], (0, 1): [[(0, "ooss")], [(1, "ss")]]}, 1, 2)
    step.rewards_PG[:] = 1.0
    assert step.sampled_tokens_PG.tolist() == [[1, 4]]
    algorithm = preset("dr_grpo", overlong_max_tokens=5, overlong_cache_tokens=2)
    got, _ = token_advantages(algorithm, step)
    np.testing.assert_allclose(got[step.sampled_N], [0.25, -0.25, -0.25, -0.25, -0.25])
    step.turn_rewards = [np.array([1.0]), np.array([1.0, 0.0]), np.array([1.0, 0.0])]
    got, _ = token_advantages(
        preset("reinforce_pp", overlong_max_tokens=5, overlong_cache_tokens=2, whiten=False), step
    )
    np.testing.assert_allclose(got[step.sampled_N], [1.0, 0.5, 0.5, -0.5, -0.5])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_in_which_everything_failed_is_silent_and_finite(estimator):
    step = describe_step({(0, 0, "failed"): [[(0, "os")]], (0, 1, "failed"): [[(0, "oss")]]}, 1, 2)
    got, returns_N = token_advantages(preset("grpo", advantage=estimator), with_values(step))
    assert not got.any()
    assert returns_N is None or np.isnan(returns_N).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_without_tokens(estimator):
    step = with_values(describe_step({}, 1, 2))
    got, _ = token_advantages(preset("grpo", advantage=estimator), step)
    assert got.shape == (0,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(data=st.data())
def test_any_episodes_in_any_order_give_the_same_advantages(estimator, data):
    keys = [(g, s) for g in range(2) for s in range(3)]
    turns = st.lists(st.text("os", min_size=1, max_size=4), min_size=1, max_size=3)
    episodes = {}
    for key in keys:
        failed = ("failed",) if data.draw(st.booleans()) else ()
        episodes[key + failed] = [list(enumerate(data.draw(turns)))]
    algorithm = preset("ppo", advantage=estimator, gamma=0.9, lam=0.8)
    step = with_values(describe_step(episodes, 2, 3))
    expected, expected_returns = token_advantages(algorithm, step)
    assert np.isfinite(expected).all()
    order = data.draw(st.permutations(list(episodes)))
    shuffled = describe_step({key: episodes[key] for key in order}, 2, 3)
    index = np.concatenate([np.flatnonzero(step.sequence_N == list(episodes).index(key)) for key in order])
    shuffled.values_N = step.values_N[index]
    got, got_returns = token_advantages(algorithm, shuffled)
    np.testing.assert_allclose(got, expected[index], atol=1e-5)
    if expected_returns is not None:
        np.testing.assert_allclose(got_returns, expected_returns[index], atol=1e-5)


def test_bad_descriptions_are_refused():
    step = small_step()
    with pytest.raises(ValueError, match="needs values_N"):
        token_advantages(preset("ppo"), step)
    backwards = describe_step({(0, 0): [[(0, "os"), (1, "os")], [(0, "s")]]}, 1, 1)
    with pytest.raises(ValueError, match="go backwards"):
        token_advantages(preset("reinforce_pp"), backwards)
    short = describe_step({(0, 0): [[(0, "os"), (1, "os")]]}, 1, 1)
    short.turn_rewards = [np.array([1.0])]
    with pytest.raises(ValueError, match="turn rewards"):
        token_advantages(preset("reinforce_pp"), short)
    with pytest.raises(ValueError, match="sequence_group_S"):
        SequenceRewards(**{**vars(step), "sequence_group_S": step.sequence_group_S + 1})
    with pytest.raises(ValueError, match="one length"):
        SequenceRewards(**{**vars(step), "turns_N": step.turns_N[1:]})
