"""Probing by name: a policy, a run, and the figures over a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rehearsal.display import probe_tables
from rehearsal.errors import RecipeError
from rehearsal.evaluation.probe import probe_policy
from rehearsal.reports.charts import chart_groups
from rehearsal.reports.data import gather
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.run import train

LAKE = {"environment.name": "frozenlake", "environment.params.size": 3}


def test_a_policy_by_its_folder(taught_folder: Path) -> None:
    figures = probe_policy(taught_folder, overrides={**LAKE, "agent.max_context": 400}, count=12)
    for kind in ("action", "forward", "inverse", "by_forward"):
        assert figures[f"{kind}/low"] <= figures[f"{kind}/accuracy"] <= figures[f"{kind}/high"]
        assert 0 < figures[f"{kind}/chance"] < 1
    _, sentence = probe_tables(figures)
    assert "Perplexity of answers" in str(sentence)


def test_several_environments_have_figures_of_their_own(taught_folder: Path) -> None:
    recipe = resolve_recipe(
        {"mixture": [{"name": "frozenlake", "params": {"size": 3}}, {"name": "bandit"}]}, {"agent.max_context": 400}
    )
    figures = probe_policy(taught_folder, recipe=recipe, count=8)
    assert {"frozenlake/action/accuracy", "bandit/action/accuracy"} <= set(figures)
    assert len(probe_tables(figures)) == 6


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bandit", "bandit is a recipe and no policy; try `rehearsal {} base --recipe bandit`."),
        ("repair", "repair is an environment and no policy; try `rehearsal {} base --environment.name repair`."),
    ],
)
def test_a_recipe_is_no_policy(
    name: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from rehearsal.cli import main

    # A hub must not be asked at all.
    monkeypatch.setattr("rehearsal.evaluation.run.load_policy", lambda *_, **__: pytest.fail("the name was looked for"))
    monkeypatch.chdir(tmp_path)
    for command in ("probe", "eval"):
        assert main([command, name]) == 2
        assert told.format(command) in capsys.readouterr().err
    # A folder of that name is a folder.
    (tmp_path / name).mkdir()

    def loaded(*_: object, **__: object) -> None:
        raise RecipeError("it was looked into")

    monkeypatch.setattr("rehearsal.evaluation.run.load_policy", loaded)
    with pytest.raises(RecipeError, match="it was looked into"):
        probe_policy(name)


def test_wrong_numbers_are_told(taught_folder: Path) -> None:
    with pytest.raises(RecipeError, match="at least one episode"):
        probe_policy(taught_folder, overrides=LAKE, count=0)


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model.path": str(folder), "agent.thinking": False, "agent.max_tokens_per_turn": 12, "agent.max_context": 400,
        "training.steps": 2, "training.groups": 2, "training.group_size": 2, "evaluation.episodes": 2,
        "evaluation.every": 0, "diagnostics.probes": 6, "engine.max_sessions": 8, "engine.memory_gib": 0.05,
        "world.mode": "dual", "adapters.policy_rank": 2, "adapters.world_rank": 2, "engine.processes": 1,
    }  # fmt: skip
    return resolve_recipe({}, settings | changes)


def test_a_run_is_probed_at_each_evaluation(taught_folder: Path) -> None:
    trainer = Trainer(recipe_of(taught_folder, **LAKE))
    trainer.run()
    assert all("probe/forward/accuracy" in figures for _, _, figures in trainer.evaluations)
    # The rules of the verdict read steps: the probe before the first one is told with it.
    assert "probe/perplexity" in trainer.history[0]
    assert "probe/perplexity" not in trainer.history[1]


@pytest.mark.parametrize("several", [False, True])
def test_the_report_shows_what_was_known_before_and_after(several: bool, taught_folder: Path, tmp_path: Path) -> None:
    mixture = {"mixture": [{"name": "frozenlake", "params": {"size": 3}}, {"name": "bandit"}]}
    recipe = recipe_of(taught_folder, **(mixture if several else LAKE))
    data = gather(train(recipe, output=tmp_path / "run", observer=SilentObserver()).path)
    charts = {chart.title: chart for group in chart_groups(data) for chart in group.charts}
    leads = ("probe/frozenlake/", "probe/bandit/") if several else ("probe/",)
    for lead in leads:
        where = f" ({lead.split('/')[1]})" if several else ""
        line = charts[f"Perplexity of answers{where}"].series[0]
        first, last = (row[f"{lead}perplexity"] for row in data.evaluations["test"])
        assert list(zip(line.x, line.y, strict=True)) == [(0, first), (2, last)] and first != last
        assert list(charts[f"Gaps filled{where}"].series[0].x) == [0, 2]
