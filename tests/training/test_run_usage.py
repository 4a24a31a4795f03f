"""What a run used is in its folder, its metrics and its report: whoever plays, and however often it was broken off."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rehearsal.environments.tasks import close_pools
from rehearsal.evaluation.run import evaluate_policy
from rehearsal.reports import write_report
from rehearsal.reports.evaluation import evaluation_parts
from rehearsal.sandbox import available, strongest
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.plan import describe_plan
from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder
from rehearsal.usage import added, is_usage

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))

from judge_server import FakeServer

MakeRecipe = Callable[..., Recipe]
LEVEL = next((level.value for level, reason in available().items() if not reason), "")
"""The weakest one there is: a recipe that names none gets the strongest."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    made.reply = lambda text: json.dumps({"criteria": [{"number": 1, "why": "so", "met": "a" in text}]})
    yield made
    made.close()
    close_pools()


@pytest.fixture
def judged(small: MakeRecipe, server: FakeServer, tmp_path: Path) -> MakeRecipe:
    """A recipe whose episodes are scored by a judge; nearly all of its answers differ."""
    return _tasks(small, tmp_path, "rubric", {
        "base_url": server.url, "model": "m", "criteria": ["is polite"], "prices": [2.0, 10.0],
    })  # fmt: skip


@pytest.fixture
def coded(small: MakeRecipe, tmp_path: Path) -> Iterator[MakeRecipe]:
    """A recipe whose answers are run as code."""
    yield _tasks(small, tmp_path, "code", {"isolation": LEVEL, "seconds": 5.0})
    close_pools()


def _tasks(small: MakeRecipe, tmp_path: Path, verifier: str, options: dict[str, Any]) -> MakeRecipe:
    source = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"Task {n}.", "reference": ["assert f() == 1"]} for n in range(60)]
    source.write_text("\n".join(map(json.dumps, rows)))
    params = {"source": str(source), "verifier": verifier, "options": options}
    usual = {
        "environment__name": "tasks", "environment__params": params, "training__steps": 2, "evaluation__every": 0,
        "filter__name": "none",
    }  # fmt: skip
    return lambda **changes: small(**{**usual, **changes})


def usage_of(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if is_usage(name)}


def recorded(run: Path) -> dict[str, float]:
    """What the lines of metrics and evaluations say, added up."""
    folder = RunFolder.open(run)
    return added(*(usage_of(row) for row in [*folder.metrics().rows, *folder.evaluations().rows]))


def test_what_a_judge_cost_is_recorded(judged: MakeRecipe, server: FakeServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = judged()
    assert f"judge: m at {server.url}" in describe_plan(recipe)
    assert not server.requests
    train(recipe, output=run)
    info = RunFolder.open(run).info
    asked = len(server.requests)
    assert asked > 8
    used = info.usage
    assert (used["judge/requests"], used["judge/prompt_tokens"]) == (asked, 100 * asked)
    assert used["judge/completion_tokens"] == 10 * asked
    assert used["judge/money"] == pytest.approx(asked * (100 * 2.0 + 10 * 10.0) / 1e6)
    # Each episode asked once, or found its answer in the cache.
    assert used["judge/requests"] + used.get("judge/cached", 0) == 2 * 4 * 3 + 2 * 4
    assert recorded(run) == pytest.approx(used)
    assert info.facts == {"judge": f"m at {server.url}"}
    page = write_report(run).read_text(encoding="utf-8")
    assert f"m at {server.url}: {asked:,} requests" in page
    assert "Tokens of the judge" in page


class Cut(SilentObserver):
    """Pulls the plug once a step is done."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def test_what_was_used_twice_counts_twice_and_nothing_else_does(
    judged: MakeRecipe, server: FakeServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = judged(training__steps=3, checkpoint__every=10)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, output=run, observer=Cut(2))
    before = dict(RunFolder.open(run).info.usage)
    assert before["judge/requests"] == len(server.requests)
    close_pools()  # with the judge's memory, so that steps that are played again cost again
    from rehearsal.environments import tasks

    tasks._verifiers.cache_clear()
    train(output=run, resume=True)
    info = RunFolder.open(run).info
    assert info.usage["judge/requests"] == len(server.requests) > before["judge/requests"]
    # There was no checkpoint: what the lines say is the run as it stands, without what was lost.
    assert added(before, recorded(run)) == pytest.approx(info.usage)


def test_a_step_that_breaks_off_is_paid_for(
    judged: MakeRecipe, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no learning today")

    trainer_step = "rehearsal.training.learner.Learner.step"
    monkeypatch.setattr(trainer_step, fails)
    with pytest.raises(RuntimeError, match="no learning"):
        train(judged(), output=tmp_path / "run")
    used = RunFolder.open(tmp_path / "run").info.usage
    assert used["judge/requests"] == len(server.requests) > recorded(tmp_path / "run")["judge/requests"]


def test_the_level_of_a_sandbox_is_recorded(coded: MakeRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = coded()
    assert f"sandbox: {LEVEL}" in describe_plan(recipe)
    train(recipe, output=run)
    info = RunFolder.open(run).info
    assert info.facts == {"sandbox": LEVEL}
    assert set(info.usage) == {f"sandbox/{LEVEL}"}
    # Each episode's code is loaded in an interpreter; that takes two calls.
    calls = info.usage[f"sandbox/{LEVEL}"]
    assert calls >= 2 * (2 * 4 * 3 + 2 * 4)
    assert recorded(run) == info.usage
    page = write_report(run).read_text(encoding="utf-8")
    assert f"{LEVEL}, {calls:,.0f} calls" in page
    figures = evaluate_policy(run, episodes=3)
    there = figures[f"sandbox/{LEVEL}"]
    assert there >= 6
    (costs,) = [part for part in evaluation_parts(figures) if part.title == "Cost"]
    assert [f"calls in the sandbox, {LEVEL}", f"{there:,.0f}"] in [list(row) for row in costs.rows]
    (result,) = [part for part in evaluation_parts(figures) if part.title == "Result"]
    assert not any(row[0].startswith("sandbox") for row in result.rows)


def test_a_tool_that_nobody_calls_is_told_with_its_level(small: MakeRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = small(
        tools__names=["python"], training__steps=1, evaluation__episodes=0, evaluation__every=0,
        agent__max_context=1000, model__path="base",
    )  # fmt: skip
    level = strongest().value
    assert f"sandbox: {level}" in describe_plan(recipe)
    with RunFolder.create(run, recipe.to_toml(), "test") as folder:
        folder.write_facts(Trainer(recipe).facts)
    assert f"{level}, no call" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_other_processes_used_comes_back(
    judged: MakeRecipe, coded: MakeRecipe, server: FakeServer, tmp_path: Path
) -> None:
    for name, recipe in (("judged", judged), ("coded", coded)):
        train(recipe(engine__processes=2), output=tmp_path / name)
        used = RunFolder.open(tmp_path / name).info.usage
        assert used
        assert recorded(tmp_path / name) == pytest.approx(used)
    assert RunFolder.open(tmp_path / "judged").info.usage["judge/requests"] == len(server.requests) > 8
    assert set(used) == {f"sandbox/{LEVEL}"}
