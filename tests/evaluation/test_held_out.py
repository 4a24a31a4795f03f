"""Held-out play: the same tasks and the same luck for every policy, and honest intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.agents.agent import Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.environments import make
from rehearsal.errors import ModelError, RecipeError
from rehearsal.evaluation.held_out import evaluate, evaluation_figures, held_out_tasks
from rehearsal.evaluation.run import evaluate_policy
from rehearsal.evaluation.statistics import mean_interval, wilson_interval
from rehearsal.generation.local import LocalEngine
from rehearsal.rollout import Rollout, tasks_of_step
from rehearsal.training.checkpoint import load_checkpoint, save_checkpoint
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder
from rehearsal.trajectory import Group, Segment, StopReason, Trajectory, Turn


@pytest.fixture
def rollout(taught_policy: Any) -> Rollout:
    limits = Limits(max_turns=3, max_actions=3, max_tokens_per_turn=12, max_context=260)
    engine = LocalEngine(taught_policy.model, max_context=260, max_sessions=8, memory_bytes=1 << 26)
    return Rollout(
        lambda: make("frozenlake", size=3), engine, taught_policy.renderer, Protocol(thinking=False), limits, seed=1
    )


def ids_of(groups: list[Group]) -> list[list[int]]:
    return [group.trajectories[0].segments[0].token_ids.tolist() for group in groups]


def test_tasks_are_fixed_by_their_seed() -> None:
    tasks = held_out_tasks(1, "test", 20)
    assert tasks == held_out_tasks(1, "test", 20)
    assert tasks[:5] == held_out_tasks(1, "test", 5)
    assert {task.split for task in tasks} == {"test"}
    assert len({task.seed for task in tasks}) == 20
    assert not {t.seed for t in tasks} & {t.seed for t in held_out_tasks(2, "test", 20)}
    assert not {t.seed for t in tasks} & {t.seed for t in held_out_tasks(1, "validation", 20)}
    assert not {t.seed for t in tasks} & {t.seed for step in range(50) for t in tasks_of_step(1, step, 20)}


def test_the_same_policy_scores_the_same_at_any_step(rollout: Rollout) -> None:
    tasks = held_out_tasks(0, "test", 6)
    first, second = evaluate(rollout, tasks, step=0), evaluate(rollout, tasks, step=40)
    assert ids_of(first.groups) == ids_of(second.groups)
    assert first.figures == second.figures
    assert [group.trajectories[0].policy_step for group in second.groups] == [40] * 6
    assert first.success == first.figures["success"]


def test_likeliest_tokens_need_no_luck(rollout: Rollout, taught_policy: Any) -> None:
    tasks = held_out_tasks(0, "test", 4)
    greedy = ids_of(evaluate(rollout, tasks, temperature=0.0).groups)
    other = Rollout(rollout.makers, rollout.engine, taught_policy.renderer, rollout.protocol, rollout.limits, seed=999)
    assert ids_of(evaluate(other, tasks, temperature=0.0).groups) == greedy
    assert ids_of(evaluate(other, tasks).groups) != greedy


def test_episodes_are_told_as_they_end(rollout: Rollout) -> None:
    told: list[Trajectory] = []
    evaluate(rollout, held_out_tasks(0, "test", 5), on_episode=told.append)
    assert len(told) == 5


# Figures


def episode(reward: float, success: bool | None = None, stop: StopReason = StopReason.TERMINATED) -> Group:
    segment = Segment(np.arange(2), [np.nan, -1.0], [0, 5], [0, 0])
    return Group(
        [Trajectory("x", 0, segments=[segment], turns=[Turn("o", rewards=[reward])], success=success, stop_reason=stop)]
    )


def test_success_counts_what_was_scored() -> None:
    groups = [episode(1.0, True), episode(0.0, False), episode(0.0, None), episode(0.0, True, StopReason.ERROR)]
    figures = evaluation_figures(groups)
    assert figures["success"] == pytest.approx(1 / 3)
    assert (figures["success_low"], figures["success_high"]) == wilson_interval(1, 3)
    assert figures["episodes"] == 4
    assert figures["failed_episodes"] == 1
    assert figures["reward"] == pytest.approx(1 / 3)


def test_without_a_word_on_success_there_is_the_reward() -> None:
    figures = evaluation_figures([episode(0.25), episode(0.75)])
    assert "success" not in figures
    assert figures["reward"] == 0.5
    assert figures["reward_low"] <= 0.5 <= figures["reward_high"]


def test_where_everything_failed_there_is_no_rate() -> None:
    figures = evaluation_figures([episode(0.0, True, StopReason.TIMEOUT)])
    assert figures["failed_episodes"] == 1
    assert not {"success", "reward", "success_low"} & figures.keys()


def test_intervals_of_a_share() -> None:
    # Values of the score interval from its formula, as in textbooks.
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@given(n=st.integers(1, 2000), data=st.data())
def test_intervals_hold_the_share_and_stay_inside(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    assert 0.0 <= low <= k / n <= high <= 1.0
    assert low < high
    wider = wilson_interval(k, n, z=3.0)
    assert wider[0] <= low
    assert wider[1] >= high


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.9):
        draws = rng.binomial(60, share, 2000)
        covered = [low <= share <= high for low, high in (wilson_interval(int(k), 60) for k in draws)]
        assert 0.92 <= np.mean(covered) <= 0.985


def test_intervals_of_a_mean() -> None:
    assert all(math.isnan(value) for value in mean_interval([]))
    assert mean_interval([0.3]) == (0.3, 0.3, 0.3)
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    mean, low, high = mean_interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert mean_interval(values.tolist()) == (mean, low, high)


# By name


RECIPE: dict[str, Any] = {
    "environment": {"name": "frozenlake", "params": {"size": 3}},
    "agent": {"thinking": False, "max_turns": 2, "max_tokens_per_turn": 12, "max_context": 260},
    "training": {"steps": 2, "groups": 2, "group_size": 3, "learning_rate": 3e-3},
    "evaluation": {"episodes": 0, "every": 0},
    "engine": {"max_sessions": 8, "memory_gib": 0.05},
    "checkpoint": {"every": 1},
}


@pytest.fixture
def recipe(taught_folder: Path) -> dict[str, Any]:
    return {**RECIPE, "model": {"path": str(taught_folder), "device": "cpu"}}


def figures_of(policy: Path, **settings: Any) -> dict[str, float]:
    return evaluate_policy(policy, episodes=6, **settings)


def test_a_run_a_folder_and_a_checkpoint_by_name(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe, output=run)
    of_run = figures_of(run)
    assert of_run == figures_of(run / "policy", recipe=recipe)
    assert of_run == figures_of(run, recipe=recipe)
    assert of_run["episodes"] == 6
    assert figures_of(run, overrides={"agent.max_turns": 1})["turns"] <= 1
    # A run that was taken up again is judged by its newest checkpoint, not by the policy of its last end.
    weights, state = load_checkpoint(run / "checkpoints" / "step_000002")
    wild = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    save_checkpoint(run / "checkpoints", 3, wild, state, keep=1)
    assert figures_of(run) == of_run
    with pytest.raises(RuntimeError), RunFolder.resume(run, "again"):
        assert figures_of(run)["format_errors"] > of_run["format_errors"] + 0.5
        raise RuntimeError("broken off")
    assert RunFolder.open(run).info.status == "failed"
    assert figures_of(run)["format_errors"] > of_run["format_errors"] + 0.5, "nor by it when it failed since"
    train(recipe, output=run, resume=True, overrides={"training.steps": 3})
    assert RunFolder.open(run).info.policy_step == 3
    assert figures_of(run) == figures_of(run / "policy", recipe=recipe)


def test_what_cannot_be_evaluated(recipe: dict[str, Any], taught_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="episodes must be 1 or more, not 0"):
        evaluate_policy(taught_folder, recipe=recipe, episodes=0)
    with pytest.raises(ModelError, match="is not a Hugging Face model folder"):
        figures_of(tmp_path / "nothing", recipe=recipe)
    with RunFolder.create(tmp_path / "young", "", "x"), pytest.raises(ModelError, match="let the run get on first"):
        figures_of(tmp_path / "young")
    with pytest.raises(RecipeError, match=r"agent\.max_context"):
        figures_of(taught_folder, recipe=recipe, overrides={"agent.max_context": 20})


def test_options_by_name(recipe: dict[str, Any], taught_folder: Path) -> None:
    seen = figures_of(taught_folder, recipe=recipe, temperature=0.0)
    assert seen == figures_of(taught_folder, recipe=recipe, temperature=0.0, overrides={"seed": 77})
    other = figures_of(taught_folder, recipe=recipe, overrides={"evaluation.seed": 5})
    assert other.keys() & {"success", "reward", "turns"} == {"success", "reward", "turns"}


def test_the_environment_is_made_and_closed(
    recipe: dict[str, Any], taught_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    kind = type(make("frozenlake"))
    original: Callable[[Any], None] = kind.close

    def close(self: Any) -> None:
        closed.append(id(self))
        original(self)

    monkeypatch.setattr(kind, "close", close)
    figures_of(taught_folder, recipe=recipe)
    # One to ask for its limits, one for the opening, one for each episode that was played at the same time.
    assert len(set(closed)) >= 3
