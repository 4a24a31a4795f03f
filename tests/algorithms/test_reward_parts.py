"""What training adds to rewards, and parts of a reward that are normalised apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rehearsal.algorithms import SequenceRewards, advantages, preset, token_advantages
from rehearsal.algorithms.reward_parts import RewardShaping, parts_matrix
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.rewards.groups import normalised_apart
from rehearsal.trajectory import Group, Kind, Segment, StopReason, ToolCall, Trajectory, Turn


def episode(*answers, success=True, reward=1.0, **turn):
    """One turn for each answer, a list of token ids; the reward comes with the last turn."""
    ids, kinds, turns = [], [], []
    for number, answer in enumerate(answers):
        ids += [99, *answer]
        kinds += [Kind.OBSERVATION, *[Kind.ACTION] * len(answer)]
        turns += [number] * (1 + len(answer))
    segment = Segment(ids, np.full(len(ids), np.nan), kinds, turns)
    made = [Turn("seen", rewards=[reward * (number == len(answers) - 1)], **turn) for number in range(len(answers))]
    return Trajectory("toy", 0, segments=[segment], turns=made, success=success)


def added(trajectory):
    return [dict(turn.shaping) for turn in trajectory.turns]


def test_nothing_is_added_unless_it_is_asked_for():
    one = episode([1, 2], violations=["rule"], obligations=["duty"])
    before = one.reward
    RewardShaping().apply([Group([one])])
    assert added(one) == [{}] and one.reward == before


def test_length_is_judged_within_its_group():
    short, long, wrong = episode([1] * 2), episode([1] * 4, [1] * 2), episode([1] * 4, success=False, reward=0.0)
    failed = episode([1] * 50)
    failed.stop_reason = StopReason.ERROR
    RewardShaping(length="kimi", length_weight=2.0).apply([Group([short, long, wrong, failed]), Group([])])
    assert [turns[-1].get("length") for turns in map(added, (short, long, wrong, failed))] == [1.0, -1.0, 0.0, None]
    assert added(long)[0] == {}, "it comes with the last turn"
    assert short.reward == 2.0 and long.reward == 0.0


def test_the_cosine_takes_the_place_of_success():
    right, wrong = episode([1] * 10), episode([1] * 20, success=False, reward=0.0)
    RewardShaping(length="cosine", length_tokens=20).apply([Group([right, wrong])])
    assert right.reward == pytest.approx(0.75) and wrong.reward == pytest.approx(-0.5)


def test_length_needs_success():
    with pytest.raises(EnvironmentFault, match="tells none"):
        RewardShaping(length="kimi").apply([Group([episode([1], success=None)])])


def test_the_answer_that_repeats_itself_bears_it():
    one = episode([1, 2, 3, 4], [7, 7, 7, 7, 7])
    RewardShaping(repetition=0.6, repetition_ngram=2).apply([Group([one])])
    assert added(one) == [{"repetition": 0.0}, {"repetition": pytest.approx(-0.6 * 0.75 / 2)}]


@pytest.mark.parametrize(("gated", "success", "earned"), [(True, True, 0.2), (True, False, 0.0), (False, False, 0.2)])
def test_rules_and_duties_by_turn(gated, success, earned):
    one = episode([1], [2], [3], success=success, reward=0.0)
    one.turns[0].violations = ["said a number", "hung up"]
    one.turns[1].obligations = ["greeted"]
    one.turns[2].obligations = ["greeted"]
    RewardShaping(violation=0.5, obligation=0.2, gated=gated).apply([Group([one])])
    assert [turn["violations"] for turn in added(one)] == [-0.5, 0.0, 0.0]
    assert [turn["obligations"] for turn in added(one)] == [0.0, earned, 0.0]
    assert list(one.turn_rewards) == pytest.approx([-0.5, earned, 0.0])


def test_the_first_call_that_told_something_earns():
    one = episode([1], [2], [3], success=False, reward=0.0)
    one.turns[0].calls = [ToolCall("calculator", error="raised")]
    one.turns[1].calls = [ToolCall("calculator", error="raised"), ToolCall("calculator")]
    one.turns[2].calls = [ToolCall("calculator")]
    RewardShaping(call=0.1).apply([Group([one])])
    assert [turn["call"] for turn in added(one)] == [0.0, 0.1, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"violation": -0.1}, {"call": math.inf}, {"repetition": math.nan}, {"length": "cosine"}, {"length_tokens": 5},
        {"length": "kimi", "length_tokens": 5},
    ],
)  # fmt: skip
def test_amounts_out_of_range(options):
    with pytest.raises(RecipeError, match="rewards"):
        RewardShaping(**options)


def parts_of(*rows):
    """Two groups of two with a part "form" as given; None for an episode that failed."""
    episodes = []
    for reward, form in rows:
        one = episode([1, 2], reward=reward, parts={} if form is None else {"form": form})
        one.stop_reason = StopReason.ERROR if form is None else StopReason.TERMINATED
        episodes.append(one)
    return [Group(episodes[:2]), Group(episodes[2:])]


def step_of(groups, parts):
    rewards_PG = np.array([group.rewards for group in groups])
    return SequenceRewards(
        rewards_PG=rewards_PG, sequence_group_S=np.array([0, 0, 1, 1]), sequence_sample_S=np.array([0, 1, 0, 1]),
        sampled_N=np.ones(4, dtype=bool), turns_N=np.zeros(4, dtype=np.int64), sequence_N=np.arange(4),
        turn_rewards=[np.array([reward]) for reward in rewards_PG.reshape(-1)], parts=parts_matrix(groups, parts),
    )  # fmt: skip


def test_parts_are_normalised_apart():
    groups = parts_of((1.0, 0.0), (0.0, 1.0), (0.0, 3.0), (0.0, 1.0))
    weights = {"reward": 1.0, "form": 0.5}
    found_N, _ = token_advantages(preset("grpo", parts=weights), step_of(groups, list(weights)))
    unit = 1 / math.sqrt(2)  # of two values, one deviation from their mean
    np.testing.assert_allclose(found_N, [0.5 * unit, -0.5 * unit, 0.5 * unit, -0.5 * unit], atol=1e-5)
    expected = normalised_apart(parts_matrix(groups, list(weights)), weights, advantages.grpo)
    np.testing.assert_allclose(found_N, expected.reshape(-1), rtol=1e-6)
    plain_N, _ = token_advantages(preset("grpo"), step_of(groups, []))
    np.testing.assert_allclose(plain_N, [unit, -unit, 0, 0], atol=1e-5)


def test_one_part_of_weight_one_is_the_reward():
    groups = parts_of((1.0, 0.0), (0.25, 1.0), (0.0, None), (2.0, 1.0))
    for name in ("grpo", "dr_grpo", "rloo"):
        apart_N, _ = token_advantages(preset(name, parts={"reward": 1.0}), step_of(groups, ["reward"]))
        plain_N, _ = token_advantages(preset(name), step_of(groups, []))
        np.testing.assert_array_equal(apart_N, plain_N)


def test_an_episode_without_a_reward_is_in_no_baseline():
    groups = parts_of((1.0, 0.0), (0.0, None), (1.0, 1.0), (0.0, 1.0))
    found_N, _ = token_advantages(
        preset("grpo", parts={"reward": 1.0, "form": 1.0}), step_of(groups, ["reward", "form"])
    )
    assert list(found_N[:2]) == [0.0, 0.0] and found_N[2] == -found_N[3] > 0


def test_the_overlong_penalty_is_a_part_of_its_own():
    groups = parts_of((1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    step = step_of(groups, ["reward"])
    step.sampled_N, step.turns_N = np.ones(6, dtype=bool), np.zeros(6, dtype=np.int64)
    step.sequence_N = np.array([0, 1, 2, 3, 3, 3])
    algorithm = preset(
        "dr_grpo", parts={"reward": 1.0, "overlong": 0.5}, overlong_max_tokens=4, overlong_cache_tokens=2
    )
    found_N, _ = token_advantages(algorithm, step)
    np.testing.assert_allclose(found_N, [0.5, -0.5, 0.125, -0.125, -0.125, -0.125])


def test_a_part_that_nobody_has():
    groups = parts_of((1.0, 0.0), (0.0, 1.0))
    with pytest.raises(EnvironmentFault, match=r"names manners, .*there are form, reward"):
        parts_matrix(groups, ["manners"])
    assert not parts_matrix(groups, ["call"])["call"][0].any(), "what shaping may add is 0 where it has not"
    failed = parts_of((1.0, None), (1.0, None))
    assert np.isnan(parts_matrix(failed, ["manners"])["manners"]).all()
    assert parts_matrix([], ["manners"])["manners"].shape == (0, 0)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ppo", {"parts": {"reward": 1.0}}, "which gae does not"),
        ("grpo", {"parts": {"reward": "much"}}, "must be a number"),
        ("grpo", {"parts": {"reward": True}}, "must be a number"),
        ("grpo", {"parts": ["reward"]}, "table of weights"),
        ("grpo", {"parts": {"reward": 1.0, "overlong": 1.0}}, "both or neither"),
        ("grpo", {"parts": {"reward": 1.0}, "overlong_max_tokens": 50}, "both or neither"),
    ],
)
def test_bad_weights(name, options, told):
    with pytest.raises(RecipeError, match=told):
        preset(name, **options)


def test_weights_are_told():
    assert "1 x reward, 0.2 x form" in preset("grpo", parts={"reward": 1, "form": 0.2}).describe()
