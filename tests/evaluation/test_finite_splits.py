"""Splits that count their tasks: each is played once, in whatever way they are played."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rehearsal.cli import main
from rehearsal.environments import check_env, make
from rehearsal.environments.proposals import Proposals
from rehearsal.errors import RecipeError
from rehearsal.evaluation.held_out import held_out_tasks
from rehearsal.evaluation.run import evaluate_mint, evaluate_policy
from rehearsal.rollout import Task
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import resolve_recipe
from rehearsal.training.tasks import TaskSource

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
SHORT = {
    "agent.thinking": False, "agent.max_tokens_per_turn": 6, "agent.max_context": 220, "model.device": "cpu",
    "training.abort_failed_share": 0.01,
}  # fmt: skip


@pytest.fixture
def sums(tmp_path: Path) -> dict[str, Any]:
    """Parameters of an environment with 7 tasks to be tested by, and 20 to train on."""
    for name, numbers in (("train", range(7, 27)), ("test", range(7))):
        rows = [{"prompt": f"{n} + {n}", "reference": str(2 * n)} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = {"train": "train", "test": "test"}
    return {"source": str(tmp_path), "verifier": "last-number", "splits": splits, "told": "Add."}


def recipe_of(params: Mapping[str, Any], **overrides: Any) -> Any:
    return resolve_recipe({"environment": {"name": "tasks", "params": dict(params)}}, {**SHORT, **overrides})


def shown(source: TaskSource, tasks: list[Task]) -> list[str]:
    envs = [variant.make() for variant in source.variants]
    return [
        envs[task.environment].reset(seed=task.seed, options={**task.options, "split": task.split})[0] for task in tasks
    ]


def test_each_task_is_there_once(sums: dict[str, Any]) -> None:
    source = TaskSource(recipe_of(sums))
    tasks = source.held_out(123, "test", 7)
    assert sorted(shown(source, tasks)) == sorted(f"{n} + {n}" for n in range(7))
    assert source.held_out(123, "test", 3) == tasks[:3]
    assert source.held_out(123, "test", 5000) == tasks, "the whole split, and no more"
    assert len({task.seed for task in tasks}) == 7
    orders = {tuple(shown(source, source.held_out(seed, "test", 7))) for seed in range(5)}
    assert len(orders) > 1, "which are the first ones depends on the seed of the evaluation"
    assert pickle.loads(pickle.dumps(tasks)) == tasks, "they go to other processes"


def test_the_test_split_of_gsm8k_is_played_whole() -> None:
    if not GSM8K.is_dir():
        pytest.skip("the data folder is not there")
    params = {"prompt": "question", "reference": "answer", "source": str(GSM8K), "verifier": "last-number"}
    source = TaskSource(recipe_of({**params, "splits": {"train": "train", "test": "test"}}))
    tasks = source.held_out(123, "test", 1319)
    assert len(set(shown(source, tasks))) == len(tasks) == 1319


def test_all_questions_of_a_lookup_world() -> None:
    source = TaskSource(resolve_recipe({"environment": {"name": "lookup"}}, {}))
    asked = shown(source, source.held_out(0, "test", 10_000))
    assert len(asked) == len(set(asked)) == make("lookup").task_count("test") == 720


def test_what_is_drawn_is_drawn_as_ever() -> None:
    source = TaskSource(resolve_recipe({"environment": {"name": "calculate"}}, {}))
    tasks = source.held_out(0, "test", 300)
    assert len(tasks) == 300 and not any(task.options for task in tasks)
    env = make("lookup")
    drawn = [env.reset(seed=seed, options={"split": "test"})[0] for seed in range(400)]
    assert len(set(drawn)) < 400, "a reset that names no task draws one"


def test_a_mixture_goes_on_without_those_that_are_used_up(sums: dict[str, Any]) -> None:
    parts = [{"name": "tasks", "params": sums}, {"name": "frozenlake", "params": {"size": 3}}]
    source = TaskSource(resolve_recipe({"mixture": parts}, SHORT))
    tasks = source.held_out(1, "test", 20)
    assert [task.environment for task in tasks] == [0, 1] * 7 + [1] * 6
    assert len({text for text in shown(source, tasks) if "+" in text}) == 7
    finite = TaskSource(resolve_recipe({"mixture": [parts[0], parts[0]]}, SHORT))
    assert len(finite.held_out(1, "test", 20)) == 14


def test_an_index_that_there_is_not(sums: dict[str, Any]) -> None:
    env = make("tasks", **sums)
    for index in (-1, 7, "a", True):
        with pytest.raises(RecipeError, match="index must be a whole number from 0 to 6"):
            env.reset(seed=0, options={"split": "test", "index": index})
    assert check_env(env).ok


def test_a_second_try_is_at_the_same_task(sums: dict[str, Any]) -> None:
    env = Proposals(make("tasks", **sums), 3)
    assert env.task_count("test") == 7
    begun, _ = env.reset(seed=5, options={"split": "test", "index": 4})
    assert env.step("-1")[2] is False
    assert env.inner.describe()["prompt"] == begun


def test_a_policy_plays_each_task_once(
    sums: dict[str, Any], taught_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures = evaluate_policy(
        taught_folder, recipe=recipe_of(sums), episodes=50, samples=2, against=taught_folder, temperature=0.0
    )
    assert (figures["tasks"], figures["episodes"], figures["against/tasks"]) == (7, 14, 7)
    assert figures["against/p_value"] == 1.0
    plain = evaluate_mint(taught_folder, recipe=recipe_of(sums), episodes=50, turns=2)
    assert plain["tasks"] == 7
    file = tmp_path / "recipe.toml"
    options = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SHORT.items())
    table = f'{options}\n[environment]\nname = "tasks"\n[environment.params]\nsource = "{sums["source"]}"\n'
    file.write_text(table + 'verifier = "last-number"\nsplits = {train = "train", test = "test"}\n')
    assert main(["eval", str(taught_folder), "--recipe", str(file), "--episodes", "1500"]) == 0
    assert "The test split has 7 tasks; each was played, instead of 1,500." in " ".join(capsys.readouterr().out.split())
    assert main(["eval", str(taught_folder), "--recipe", str(file), "--episodes", "7"]) == 0
    assert "split has" not in capsys.readouterr().out


def test_a_run_judges_itself_by_each_task_once(sums: dict[str, Any], taught_folder: Path) -> None:
    trainer = Trainer(recipe_of(sums, **{"model.path": str(taught_folder), "engine.processes": 1}))
    try:
        found = trainer.evaluate("test", 50)
    finally:
        trainer.close()
    assert found is not None
    assert len({group.trajectories[0].task for group in found.groups}) == len(found.groups) == 7


def test_drawn_tasks_are_different_as_long_as_there_are_others() -> None:
    source = TaskSource(resolve_recipe({"environment": {"name": "frozenlake"}}))
    tasks = source.held_out(123, "test", 128)
    env = make("frozenlake")

    def keys(some: Sequence[Task]) -> list[str]:
        return [env.reset(seed=task.seed, options={"split": "test"})[1]["task"] for task in some]

    assert len(set(keys(tasks))) == len(tasks) == 128
    assert len(set(keys(held_out_tasks(123, "test", 128)))) < 128, "drawn without a look, some come twice"
    assert source.held_out(123, "test", 40) == tasks[:40]
    assert TaskSource(resolve_recipe({"environment": {"name": "frozenlake"}})).held_out(123, "test", 128) == tasks


def test_few_tasks_come_again_evenly() -> None:
    recipe = resolve_recipe({"environment": {"name": "frozenlake", "params": {"size": 2, "frozen": 1.0}}})
    tasks = TaskSource(recipe).held_out(0, "train", 60)
    env = make("frozenlake", size=2, frozen=1.0)
    met = Counter(env.reset(seed=task.seed, options={"split": "train"})[1]["task"] for task in tasks)
    assert len(tasks) == 60
    assert max(met.values()) - min(met.values()) <= 1
