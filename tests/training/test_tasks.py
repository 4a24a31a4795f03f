"""Curricula and mixtures in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rehearsal.algorithms.credit import one_scale
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.rollout import tasks_of_step
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train
from rehearsal.training.tasks import TaskSource
from rehearsal.training.trajectory_store import read_trajectories
from rehearsal.trajectory import all_trajectories

MIXED = [
    {"name": "frozenlake", "params": {"size": 3}, "weight": 3.0},
    {"name": "bandit", "params": {"held_out": "pairs"}},
]


def test_without_a_curriculum_tasks_are_fresh(small: Callable[..., Recipe]) -> None:
    source = TaskSource(small())
    assert source.of_step(3, 8) == tasks_of_step(0, 3, 8)
    assert source.of_step(3, 4, first=8) == tasks_of_step(0, 3, 4, first=8)
    assert source.families is None


def test_a_pool_is_met_again(small: Callable[..., Recipe]) -> None:
    source = TaskSource(small(curriculum__name="uniform", curriculum__tasks=6))
    seeds = {task.seed for step in range(20) for task in source.of_step(step, 4)}
    assert len(seeds) == 6
    other = TaskSource(small(curriculum__name="uniform", curriculum__tasks=6, seed=1))
    assert not seeds & {task.seed for step in range(20) for task in other.of_step(step, 4)}


def test_a_task_that_a_step_plays_twice_gives_other_episodes(small: Callable[..., Recipe]) -> None:
    trainer = Trainer(
        small(curriculum__name="uniform", curriculum__tasks=3, training__groups=8, evaluation__episodes=0)
    )
    groups = trainer.play().groups
    assert len({group.trajectories[0].seed for group in groups}) == 3
    played = {b"".join(episode.segments[-1].token_ids.tobytes() for episode in group) for group in groups}
    assert len(played) == 8, "the same task again is played with other noise"


def test_refilled_groups_are_other_tasks(small: Callable[..., Recipe]) -> None:
    source = TaskSource(small(curriculum__name="difficulty", curriculum__tasks=12))
    first = source.of_step(0, 8)
    more = source.of_step(0, 4, first=8)
    assert len({task.seed for task in (*first, *more)}) == 12
    assert {task.again for task in (*first, *more)} == {0}
    assert {task.again for task in source.of_step(0, 4, first=12)} == {1}


@pytest.mark.parametrize("name", ["difficulty", "variance", "progress"])
def test_a_run_with_a_curriculum_resumes_as_if_it_had_not_stopped(
    name: str, small: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = small(curriculum__name=name, curriculum__tasks=6, evaluation__episodes=0, save_trajectories_every=1)

    class StopAfterTwo(SilentObserver):
        def started(self, trainer: Trainer) -> None:
            self.trainer = trainer

        def learning(self) -> None:
            self.trainer.stop_requested = self.trainer.steps_done == 1

    whole = train(recipe, output=tmp_path / "whole")
    train(recipe, output=tmp_path / "parts", observer=StopAfterTwo())
    train(output=tmp_path / "parts", resume=True)
    for step in range(1, 5):
        ends = [seeds_of(tmp_path / run, step) for run in ("whole", "parts")]
        assert ends[0] == ends[1]
    assert whole.summary["steps"] == 4


def seeds_of(run: Path, step: int) -> list[int]:
    file = run / "trajectories" / f"train_{step:06d}.parquet"
    return [trajectory.seed for trajectory in all_trajectories(read_trajectories(file))]


def test_stages_grow_and_are_judged_by_the_last(small: Callable[..., Recipe]) -> None:
    recipe = small(
        curriculum__name="staged", curriculum__stages=[{"size": 3}, {"size": 4}], curriculum__threshold=0.0,
        curriculum__window=2, curriculum__review=0.0, agent__max_context=400, evaluation__every=0,
    )  # fmt: skip
    trainer = Trainer(recipe)
    assert {task.environment for task in trainer.tasks.held_out(0, "test", 4)} == {1}
    first = trainer.play()
    assert first.groups[0].trajectories[0].turns[0].observation.count("\n") < 3 + 1
    second = trainer.play()
    rows = second.groups[0].trajectories[0].turns[0].observation.splitlines()
    assert len([row for row in rows if row.count("_") + row.count("O") >= 1]) >= 3
    assert trainer.tasks.sampler.figures()["curriculum/stage"] == 1.0
    trainer.close()


def test_stages_may_change_the_limits_of_the_agent(small: Callable[..., Recipe]) -> None:
    recipe = small(
        curriculum__name="staged", agent__max_context=400,
        curriculum__stages=[{"size": 3}, {"size": 4, "agent": {"max_turns": 7, "max_actions_per_turn": 1}}],
    )  # fmt: skip
    trainer = Trainer(recipe)
    first, second = trainer.rollout.all_limits
    assert first.max_turns == 3
    assert (second.max_turns, second.max_actions_per_turn) == (7, 1)
    trainer.close()


def test_a_mixture_of_environments(small: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = small(mixture=MIXED, training__steps=2, evaluation__episodes=4)
    result = train(recipe, output=tmp_path / "run")
    assert result.summary["steps"] == 2
    trainer = Trainer(recipe)
    batch = trainer.play()
    assert [group.trajectories[0].environment for group in batch.groups] == ["frozenlake"] * 3 + ["bandit"]
    assert trainer.tasks.families == [0, 0, 0, 1]
    evaluation = trainer.evaluate("validation", 6)
    assert evaluation is not None
    assert {"success/frozenlake", "success/bandit"} <= evaluation.figures.keys()
    trainer.close()


def test_several_environments_in_other_processes(small: Callable[..., Recipe]) -> None:
    here = Trainer(small(mixture=MIXED, evaluation__episodes=0))
    there = Trainer(small(mixture=MIXED, evaluation__episodes=0, engine__processes=2))
    expected, played = here.play().groups, there.play().groups
    there.close()
    here.close()
    for one, other in zip(all_trajectories(expected), all_trajectories(played), strict=True):
        assert one.environment == other.environment
        assert np.array_equal(one.segments[0].token_ids, other.segments[0].token_ids)


def test_advantages_of_different_environments_meet_on_one_scale() -> None:
    rng = np.random.default_rng(0)
    family_N = np.repeat([0, 1, 2], 100)
    advantages_N = (rng.standard_normal(300) * np.repeat([1.0, 50.0, 0.0], 100)).astype(np.float32)
    included_N = np.ones(300, dtype=bool)
    scaled_N = one_scale(advantages_N, family_N, included_N)
    for family in (0, 1):
        assert np.sqrt((scaled_N[family_N == family] ** 2).mean()) == pytest.approx(1.0, rel=1e-5)
    assert (scaled_N[family_N == 2] == 0).all()
    assert (np.sign(scaled_N) == np.sign(advantages_N)).all()
    included_N[family_N == 1] = False
    left = one_scale(advantages_N, family_N, included_N)
    assert np.array_equal(left[family_N == 1], advantages_N[family_N == 1])


def test_a_curriculum_needs_success(small: Callable[..., Recipe]) -> None:
    recipe = small(curriculum__name="difficulty", curriculum__tasks=4, evaluation__episodes=0)
    trainer = Trainer(recipe)
    batch = trainer.play()
    for trajectory in all_trajectories(batch.groups):
        trajectory.success = None
    with pytest.raises(EnvironmentFault, match="the environment tells none"):
        trainer.tasks.observe(batch.groups)
    trainer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum__name": "staged"}, "needs curriculum.stages"),
        ({"curriculum__stages": [{"size": 3}]}, "no other curriculum has them"),
        ({"curriculum__name": "hard"}, "curriculum.name"),
        ({"curriculum__name": "staged", "curriculum__stages": [{"size": 3}], "mixture": MIXED}, "has no stages"),
        ({"mixture": [{"name": "frozenlake", "weight": 0.0}]}, "mixture.0.weight"),
        ({"mixture": [{"nam": "frozenlake"}]}, "nam"),
        ({"mixture": [{"name": "frozenlak"}]}, "frozenlak"),
        ({"curriculum__name": "staged", "curriculum__stages": [{"sise": 3}]}, "sise"),
        ({"curriculum__name": "staged", "curriculum__stages": [{"agent": 3}]}, "agent in stage 1 must be a table"),
        ({"curriculum__name": "staged", "curriculum__stages": [{"agent": {"thinking": True}}]}, "in stage 1"),
        ({"curriculum__name": "staged", "curriculum__stages": [{"agent": {"max_turns": 0}}]}, "max_turns in stage 1"),
    ],
)
def test_wrong_options(changes: dict[str, Any], message: str, small: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=message):
        Trainer(small(**changes))
