"""Figures that need no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from rehearsal.diagnostics import behaviour_metrics, signal_metrics
from rehearsal.trajectory import Group, Kind, SampleStop, Segment, StopReason, Trajectory, Turn


def made_up(*rewards: float | None, success: Sequence[bool | None] | None = None) -> Group:
    """A group with these rewards; None for an episode that failed."""
    outcomes = success or (None,) * len(rewards)
    return Group(
        [
            Trajectory(
                "x", 0, turns=[Turn("o", rewards=[reward or 0.0])], success=outcome,
                stop_reason=StopReason.ERROR if reward is None else StopReason.TERMINATED,
            )
            for reward, outcome in zip(rewards, outcomes, strict=True)
        ]
    )  # fmt: skip


def test_dead_groups_are_counted_by_what_killed_them() -> None:
    groups = [
        made_up(1.0, 1.0, success=(True, True)),
        made_up(0.0, 0.0, None, success=(False, False, True)),
        made_up(0.5, 0.5, success=(True, False)),
        made_up(0.0, 1.0, success=(False, True)),
        made_up(None, None),
        made_up(0.3, 0.3),
    ]
    figures = signal_metrics(groups)
    assert figures["signal/dead_groups"] == pytest.approx(4 / 5)
    assert figures["signal/dead_groups_solved"] == pytest.approx(1 / 5)
    assert figures["signal/dead_groups_failed"] == pytest.approx(1 / 5)
    assert figures["signal/dead_groups_equal"] == pytest.approx(2 / 5)
    assert figures["signal/reward_std_in_group"] == pytest.approx(0.5 / 5)
    assert figures["signal/variance_mean"] == pytest.approx(0.25 / 5)
    assert figures["signal/variance_q50"] == 0.0
    assert figures["signal/variance_q90"] == pytest.approx(0.25 * 0.6)
    assert figures["signal/variance_spread"] == pytest.approx(2.0)


def test_what_rewards_have_to_do_with_success() -> None:
    def told(*groups: Group) -> float | None:
        return signal_metrics(groups).get("signal/success_correlation")

    paid = made_up(1.0, 0.0, 0.0, success=(True, False, False))
    blind = made_up(1.0, 0.0, 1.0, 0.0, success=(True, True, False, False))
    against = made_up(0.0, 1.0, success=(True, False))
    assert told(paid) == pytest.approx(1.0)
    assert told(blind) == pytest.approx(0.0)
    assert told(against) == pytest.approx(-1.0)
    # An easy task that pays and a hard one that does not: inside each of them nothing depends on success.
    assert told(made_up(1.0, 1.0, 0.9, success=(True, True, True)), made_up(0.0, 0.1, success=(False, False))) is None
    assert told(paid, made_up(5.0, 5.0, success=(False, False))) == pytest.approx(1.0)
    assert told(made_up(1.0, None, success=(True, False))) is None
    assert told(made_up(1.0, 0.0)) is None
    rng = np.random.default_rng(0)
    chance = [made_up(*rng.integers(0, 2, 8), success=rng.integers(0, 2, 8).astype(bool).tolist()) for _ in range(400)]
    assert abs(told(*chance) or 1.0) < 0.06


def test_batches_without_a_reward() -> None:
    # Where all have failed no rewards are equal, and nobody is to be told to look at how they are made.
    assert signal_metrics([]) == signal_metrics([made_up(None, None)]) == {}
    # Where nothing is compared nothing is dead: algorithms that do without groups are not to be told that theirs are.
    assert signal_metrics([made_up(1.0, success=(True,)), made_up(0.0, success=(False,))]) == {}
    # One of two episodes is missing: its group should have had something to compare.
    assert signal_metrics([made_up(1.0, None)])["signal/dead_groups"] == 1.0


def spoken(thought: Sequence[int], states: Sequence[str], valid: Sequence[bool] | None = None) -> Trajectory:
    ids = [1, *thought, 80, 81]
    kinds = [Kind.OBSERVATION, *[Kind.THOUGHT] * len(thought), Kind.ACTION, Kind.ACTION]
    logprobs = [math.nan, *[-0.5] * len(thought), -2.0, -4.0]
    turns = [Turn("o", state=state, valid=ok) for state, ok in zip(states, valid or [True] * len(states), strict=True)]
    return Trajectory("x", 0, segments=[Segment(ids, logprobs, kinds, [0] * len(ids))], turns=turns)


def test_entropy_and_length_by_kind() -> None:
    figures = behaviour_metrics([Group([spoken([5, 6, 7, 8], ["a"]), spoken([5, 6], ["a"])])])
    assert figures["behaviour/entropy_thought"] == pytest.approx(0.5)
    assert figures["behaviour/entropy_action"] == pytest.approx(3.0)
    tokens = figures["behaviour/thought_tokens"], figures["behaviour/answer_tokens"]
    assert figures["behaviour/entropy"] == pytest.approx((tokens[0] * 0.5 + tokens[1] * 3.0) / sum(tokens))
    assert figures["behaviour/thought_tokens"] == 3.0
    assert figures["behaviour/answer_tokens"] == 2.0


def test_states_that_come_again() -> None:
    episode = spoken([5], ["a", "a", "b", "a"], [True, False, True, True])
    figures = behaviour_metrics([Group([episode])])
    assert figures["behaviour/repeated_states"] == pytest.approx(2 / 4)
    # Of the three turns with a turn after them one was invalid; of the others the first changed nothing.
    assert figures["behaviour/unchanged_states"] == pytest.approx(1 / 2)
    assert figures["behaviour/invalid_turns"] == pytest.approx(1 / 4)
    assert "behaviour/repeated_states" not in behaviour_metrics([Group([spoken([5], ["", "a"])])])


def test_answers_that_were_cut_off() -> None:
    episode = spoken([5], ["a", "b"])
    episode.turns[1].stop = SampleStop.LENGTH
    assert behaviour_metrics([Group([episode])])["behaviour/cut_off"] == 0.5


def test_thoughts_that_are_one_template() -> None:
    different = [Group([spoken(range(10 * p, 10 * p + 6), ["a"])]) for p in range(8)]
    figures = behaviour_metrics(different)
    assert figures["behaviour/distinct_ngrams"] == 1.0
    assert figures["behaviour/shared_ngrams"] == 0.0
    same = [Group([spoken([1, 2, 3, 4, 5, 6], ["a"])]) for _ in range(8)]
    figures = behaviour_metrics(same)
    assert figures["behaviour/distinct_ngrams"] == pytest.approx(1 / 8)
    assert figures["behaviour/shared_ngrams"] == 1.0


def test_nothing_to_see() -> None:
    assert behaviour_metrics([]) == {}
    assert behaviour_metrics([Group([])]) == {}
    failed = Trajectory("x", 0, stop_reason=StopReason.ERROR)
    assert behaviour_metrics([Group([failed])]) == {}
    silent = Trajectory("x", 0, segments=[Segment([1], [np.nan], [Kind.OBSERVATION], [0])])
    assert all(math.isfinite(value) for value in behaviour_metrics([Group([silent])]).values())
    unknown = spoken([5], ["a"])
    unknown.segments[0].logprobs[:] = np.nan
    assert not [name for name in behaviour_metrics([Group([unknown])]) if "entropy" in name]
