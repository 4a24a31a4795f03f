"""Tools that a stage unlocks: when, for whom, over a resume and in other processes, and in evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rehearsal.errors import RecipeError
from rehearsal.evaluation.run import evaluate_policy
from rehearsal.models.load import save_policy
from rehearsal.rollout import Task
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.plan import describe_plan
from rehearsal.training.playing import make_toolkit
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.run import train
from rehearsal.training.tasks import TaskSource, locked_tools
from rehearsal.training.trajectory_store import read_trajectories
from rehearsal.trajectory import Trajectory, all_trajectories

MakeRecipe = Callable[..., Recipe]
CALCULATOR = "rehearsal.agents.toolkit.calculator:Calculator"
NOTEBOOK = "rehearsal.agents.toolkit.notebook:Notebook"
STAGED: dict[str, Any] = {
    "tools__names": ["calculator", "notebook"], "tools__max_calls": 2, "agent__max_context": 1500,
    "curriculum__name": "staged", "curriculum__window": 2, "curriculum__review": 0.5, "curriculum__threshold": 1.0,
    "curriculum__stages": [{"size": 3}, {"size": 3, "tools": ["calculator"]}, {"size": 4}], "curriculum__patience": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def roomy_folder(tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Any, tiny_qwen3: Callable[..., Any]) -> Path:
    """A model with random weights and room for the rules of several tools. It never succeeds, so stages stall."""
    model = tiny_qwen3(
        len(base_tokenizer), seed=5, eos_token_id=base_tokenizer.eos_token_id, max_position_embeddings=2048
    )
    folder = tmp_path_factory.mktemp("models") / "roomy"
    save_policy(model, base_tokenizer, folder)
    return folder


@pytest.fixture
def staged(small: MakeRecipe, roomy_folder: Path) -> MakeRecipe:
    def build(**changes: Any) -> Recipe:
        return small(**{**STAGED, "model__path": str(roomy_folder), "evaluation__episodes": 0, **changes})

    return build


def has_calculator(trajectory: Trajectory) -> bool:
    return "tool_calls/calculator" in trajectory.counters


def episodes_of(run: Path, step: int, phase: str = "train") -> list[Trajectory]:
    return all_trajectories(read_trajectories(run / "trajectories" / f"{phase}_{step:06d}.parquet"))


def test_what_is_locked_in_each_stage(staged: MakeRecipe) -> None:
    assert locked_tools(staged()) == [(CALCULATOR,), (), ()]
    stages = [{"tools": ["notebook"]}, {}, {"tools": ["calculator", "look"]}, {"tools": ["calculator"]}]
    locked = ("look", CALCULATOR)
    assert locked_tools(staged(curriculum__stages=stages)) == [locked, locked, (), ()]
    assert locked_tools(resolve_recipe({})) == [()]


def test_tasks_are_played_with_the_tools_of_the_present_stage(staged: MakeRecipe) -> None:
    source = TaskSource(staged())
    assert {task.locked for task in source.of_step(0, 8)} == {(CALCULATOR,)}
    assert {(task.environment, task.locked) for task in source.held_out(0, "test", 4)} == {(2, (CALCULATOR,))}
    source.sampler.stage = 1  # type: ignore[attr-defined]
    tasks = source.of_step(1, 32)
    assert {task.environment for task in tasks} == {0, 1}
    assert {task.locked for task in tasks} == {()}, "earlier stages have what was unlocked since"
    assert {(task.environment, task.locked) for task in source.held_out(0, "test", 4)} == {(2, ())}


def test_a_tool_appears_when_tasks_are_too_hard_without_it(staged: MakeRecipe, tmp_path: Path) -> None:
    recipe = staged(save_trajectories_every=1, evaluation__every=1)

    class StopAfterTwo(SilentObserver):
        def started(self, trainer: Trainer) -> None:
            self.trainer = trainer

        def learning(self) -> None:
            self.trainer.stop_requested = self.trainer.steps_done == 1

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, output=whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    # Two groups fill the window, and four without a rise end the stage: the second step does.
    assert [row["curriculum/stage"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    for step in range(1, 5):
        for trajectory in episodes_of(whole, step):
            assert has_calculator(trajectory) == (step > 2)
            assert "tool_calls/write_note" in trajectory.counters
        # A held-out episode is played after its step; none are after the last.
        assert step == 4 or {has_calculator(one) for one in episodes_of(whole, step, "eval")} == {step >= 2}
    train(recipe, output=parts, observer=StopAfterTwo())
    assert len(list((parts / "trajectories").glob("train_*"))) == 2
    train(output=parts, resume=True)
    for step in range(1, 5):
        for one, other in zip(episodes_of(whole, step), episodes_of(parts, step), strict=True):
            assert np.array_equal(one.segments[0].token_ids, other.segments[0].token_ids)
    # The policy of a run is judged with the tools of its stage, any other with all.
    assert "tools/calculator/used" in evaluate_policy(parts, episodes=2)
    early = tmp_path / "early"
    train(recipe, output=early, observer=StopAfterTwo(), overrides={"curriculum.patience": 100})
    assert "tools/calculator/used" not in evaluate_policy(early, episodes=2)
    assert "tools/calculator/used" in evaluate_policy(early / "policy", recipe=recipe, episodes=2)


def test_the_prompt_tells_of_a_tool_from_its_stage_on(staged: MakeRecipe) -> None:
    trainer = Trainer(staged())
    renderer = trainer.rollout.renderer
    assert renderer is not None

    def rules() -> str:
        (trajectory, *_) = trainer.play().groups[0]
        return renderer.decode(trajectory.segments[0].token_ids[trajectory.segments[0].turns == 0])

    first = rules()
    assert "write_note" in first and "calculator" not in first
    trainer.tasks.sampler.stage = 1  # type: ignore[attr-defined]
    assert "write_note" in (second := rules()) and "calculator" in second
    trainer.close()


def test_other_processes_lock_the_same_tools(staged: MakeRecipe) -> None:
    trainer = Trainer(staged(engine__processes=2))
    groups = trainer.player.play([Task(0, locked=(CALCULATOR,)), Task(0)], 1)
    assert [has_calculator(group.trajectories[0]) for group in groups] == [False, True]
    trainer.close()


def test_the_plan_says_what_is_unlocked_when(staged: MakeRecipe) -> None:
    text = describe_plan(staged())
    assert "  calculator(expression: string)" in text
    assert "  stage 2 unlocks calculator" in text


def test_an_environments_own_tools_can_be_unlocked() -> None:
    stages = [{"hops": 1}, {"hops": 2, "tools": ["search", "open"]}]
    recipe = resolve_recipe({"environment": {"name": "lookup"}, "curriculum": {"name": "staged", "stages": stages}})
    make_toolkit(recipe).close()
    assert locked_tools(recipe) == [("open", "search"), ()]


def test_a_staged_recipe_survives_its_own_file(staged: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(staged().to_toml())
    assert resolve_recipe(path) == staged()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"curriculum__stages": [{"size": 3, "tools": "calculator"}]}, "Tools in stage 1 must be a list of names"),
        ({"curriculum__stages": [{"size": 3}, {"tools": [3]}]}, "Tools in stage 2 must be a list"),
        ({"curriculum__stages": [{"size": 3}, {"tools": ["calculater"]}]}, "did you mean calculator"),
        ({"curriculum__stages": [{"size": 3}, {"tools": ["write_note"]}]}, "no tool .* 'write_note'"),
        ({"curriculum__stages": [{"size": 3}, {"size": 4}]}, "name tools in a later stage"),
        ({"curriculum__stages": [{"size": 3, "tools": ["calculator"]}]}, "name tools in a later stage"),
        ({"curriculum__patience": 0}, "curriculum.patience"),
    ],
)
def test_wrong_options(changes: dict[str, Any], told: str, staged: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=told):
        make_toolkit(staged(**changes))
