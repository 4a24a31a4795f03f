"""The parts of experiments that decide what is found: how a fall is dated, a detector judged, thresholds chosen."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import collapse, filtering, helpdesk, main_job, world_model_rl  # noqa: E402
from experiments.cells import run_cells  # noqa: E402
from rehearsal.algorithms.filters import make_filter  # noqa: E402
from rehearsal.diagnostics import Thresholds  # noqa: E402
from rehearsal.environments import make  # noqa: E402
from rehearsal.environments.check import check_env  # noqa: E402
from rehearsal.training.recipe import resolve_recipe  # noqa: E402
from rehearsal.trajectory import Group, StopReason, Trajectory, Turn  # noqa: E402


def run(fall: int | None, sign: int | None, steps: int = 50) -> list[dict[str, float]]:
    """A run whose success falls at a step and whose answers break at another."""
    return [
        {
            "step": step,
            "train/success": 0.2 if fall is not None and step >= fall else 0.6,
            "behaviour/invalid_turns": 0.5 if sign is not None and step >= sign else 0.0,
        }
        for step in range(1, steps + 1)
    ]


def test_a_fall_is_dated_by_the_mean_of_five_steps() -> None:
    assert collapse.fall_of(run(None, None)) is None
    # Two of five steps at 0.2 bring the mean from 0.6 to 0.44, below four fifths of it.
    assert collapse.fall_of(run(30, None)) == 31


def test_the_fall_itself_is_no_call() -> None:
    assert collapse.called_at(run(30, None), Thresholds()) is None
    called = collapse.called_at(run(30, 15), Thresholds())
    assert called is not None
    step, name = called
    assert name == "format_lost"
    assert 17 <= step <= 20


def test_the_detector_is_judged() -> None:
    pushed = [run(30, 10), run(30, 15), run(20, 40), run(None, 10)]
    healthy = [run(None, None), run(None, None), run(None, 10), run(None, None)]
    found = collapse.calls_of(pushed, healthy, Thresholds()).figures()
    assert found["collapses"] == 3, "one of the pushed runs never fell"
    assert found["called"] == pytest.approx(2 / 3), "a call after the fall is none"
    assert 13 <= found["median_lead"] <= 17
    assert found["false_alarms"] == 0.25
    nothing = collapse.calls_of([], [], Thresholds()).figures()
    assert math.isnan(nothing["called"])


def test_thresholds_are_chosen_by_what_they_find() -> None:
    weak = [[{**row, "behaviour/invalid_turns": row["behaviour/invalid_turns"] * 0.16} for row in run(30, 10)]]
    assert collapse.calls_of(weak, [run(None, None)], Thresholds()).figures()["called"] == 0
    chosen = collapse.choose(weak, [run(None, None)])
    assert chosen.invalid == 0.05
    assert collapse.calls_of(weak, [run(None, None)], chosen).figures()["called"] == 1
    # What nothing tells about stays quiet, and so does what is told loudly enough.
    assert chosen.longer == max(collapse.CANDIDATES["longer"])
    loud = collapse.choose([run(30, 10)], [run(None, None)])
    assert loud.invalid == max(collapse.CANDIDATES["invalid"])


def test_candidates_go_from_quiet_to_sharp() -> None:
    for name, values in collapse.CANDIDATES.items():
        assert list(values) in (sorted(values), sorted(values, reverse=True)), name
        assert getattr(Thresholds(), name) in values, f"the shipped {name} is one that could be chosen"


def test_the_coin_knows_nothing_of_the_lake() -> None:
    assert check_env(make("experiments.collapse:CoinLake")).ok
    env = make("experiments.collapse:CoinLake")
    rewards = []
    for seed in range(200):
        env.reset(seed=seed, options={"split": "train"})
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step("Up" if seed % 2 else "Down")
            total += reward
            over = terminated or truncated
        rewards.append(total)
    assert set(rewards) == {0.0, 1.0}
    assert 0.4 < sum(rewards) / 200 < 0.6


def test_every_cell_is_a_recipe() -> None:
    for environment in filtering.ENVIRONMENTS.values():
        for arm in filtering.ARMS.values():
            recipe = resolve_recipe(environment["recipe"], {**filtering.COMMON, **environment["overrides"], **arm})
            make_filter(recipe.filter.name, **recipe.filter.options)
    for arm, changes in {**collapse.PUSHED, **collapse.HEALTHY}.items():
        recipes = [resolve_recipe("frozenlake", part) for part in collapse.parts_of(arm, changes, {})]
        assert sum(recipe.training.steps for recipe in recipes) == collapse.STEPS
        for recipe in recipes:
            make(recipe.environment.name, **recipe.environment.params)


def test_cells_of_another_base_are_not_taken(tmp_path: Path) -> None:
    played: list[str] = []

    def play(settings: Mapping[str, Any]) -> dict[str, Any]:
        played.append(settings["base"])
        return {"after": 1.0}

    for base in ("old", "old", "new"):
        run_cells("x", {"cell": {"base": base}}, play, tmp_path)
    assert played == ["old", "new"]
    assert json.loads((tmp_path / "x" / "cell.json").read_text())["settings"] == {"base": "new"}


def test_the_control_of_the_main_job_deals_the_rewards_of_a_group_out_anew() -> None:
    episodes = [
        Trajectory("lake", 0, sample=i, turns=[Turn("", rewards=[0.1 * i], penalty=-0.5), Turn("", rewards=[float(i)])])
        for i in range(8)
    ]
    episodes.append(Trajectory("lake", 0, sample=8, turns=[Turn("")], stop_reason=StopReason.ERROR))
    group = Group(episodes)
    before = group.rewards
    main_job.deal_rewards([group], np.random.default_rng(0))
    after = group.rewards
    assert sorted(after[:8]) == pytest.approx(sorted(before[:8]))
    assert (after[:8] != before[:8]).any()
    assert math.isnan(after[8])


def wait(settings: Mapping[str, Any]) -> dict[str, Any]:
    time.sleep(settings["seconds"])
    return {"finished": time.time()}


def test_cells_are_stored_as_they_finish(tmp_path: Path) -> None:
    cells = {"slow": {"seconds": 1.0}, "fast": {"seconds": 0.0}}
    run_cells("x", cells, wait, tmp_path, workers=2)
    stored = {name: (tmp_path / "x" / f"{name}.json").stat().st_mtime for name in cells}
    assert stored["fast"] < stored["slow"]


def test_the_arms_of_the_help_desk_are_recipes() -> None:
    names = {arm: resolve_recipe(None, {**helpdesk.COMMON, **changes}) for arm, changes in helpdesk.ARMS.items()}
    for arm, recipe in names.items():
        ranks = recipe.adapters.policy_rank + recipe.adapters.world_rank
        assert ranks == 64, f"{arm} has as many parameters as the others"
        make(recipe.environment.name, **recipe.environment.params)
    assert names["placebo"].agent.rehearse == names["dual_rehearse"].agent.rehearse is True
    assert names["placebo"].world.mode == "placebo"


def test_only_companies_of_the_training_split_are_called_that_the_base_has_not_met() -> None:
    met = {make("helpdesk", world=helpdesk.WORLD_OF_THE_BASE).unwrapped.company(i).name for i in range(helpdesk.MET)}
    for span in (helpdesk.LEAD_IN, helpdesk.NEW, helpdesk.MANY):
        env = make("helpdesk")
        called = helpdesk.training_companies(span)
        assert {env.unwrapped.company(index).split for index in called} == {"train"}
        assert not met & {env.unwrapped.company(index).name for index in called}
        assert 0.7 * len(span) <= len(called) <= 0.8 * len(span) + 1


def test_a_person_needs_few_calls() -> None:
    companies = helpdesk.training_companies(helpdesk.NEW)[:8]
    new, changed = helpdesk.person(companies, 0)
    assert len(new) == len(changed) == 8
    assert 1.0 <= np.mean(new) < 2.0, "what was said once is known"
    # Some want less than before: what is known of them still serves.
    assert 0.5 <= np.mean(changed) < 3.0
    assert helpdesk.person(companies, 0) == (new, changed)


def test_episodes_to_a_level_lie_between_the_tests() -> None:
    curve = [[0.0, 0.2], [100.0, 0.4], [200.0, 0.8]]
    assert world_model_rl.episodes_to(curve, 0.6) == pytest.approx(150.0)
    assert world_model_rl.episodes_to(curve, 0.4) == pytest.approx(100.0)
    assert world_model_rl.episodes_to(curve, 0.1) == 0.0
    assert math.isnan(world_model_rl.episodes_to(curve, 0.9))
    mean = world_model_rl.mean_curve([{"curve": curve}, {"curve": [[0.0, 0.4], [100.0, 0.6]]}])
    assert [point[0] for point in mean] == [0.0, 100.0, 200.0]
    assert [point[1] for point in mean] == pytest.approx([0.3, 0.5, 0.8])


def test_the_arms_of_the_world_model_are_recipes() -> None:
    for environment in world_model_rl.ENVIRONMENTS.values():
        for arm, changes in world_model_rl.ARMS.items():
            recipe = resolve_recipe(
                environment["recipe"], {**world_model_rl.COMMON, **environment["overrides"], **changes}
            )
            assert recipe.adapters.policy_rank + recipe.adapters.world_rank == 64, arm
            assert 0 < environment["first"] < recipe.training.steps
