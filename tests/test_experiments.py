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

from experiments import collapse, filtering, helpdesk, main_job, tool_use, tool_use_arms, world_model_rl  # noqa: E402
from experiments.cells import run_cells  # noqa: E402
from rehearsal.agents.toolbox import Toolbox  # noqa: E402
from rehearsal.algorithms.filters import make_filter  # noqa: E402
from rehearsal.algorithms.presets import preset  # noqa: E402
from rehearsal.diagnostics import Thresholds  # noqa: E402
from rehearsal.environments import make  # noqa: E402
from rehearsal.environments.check import check_env  # noqa: E402
from rehearsal.training.recipe import resolve_recipe  # noqa: E402
from rehearsal.training.tasks import TaskSource  # noqa: E402
from rehearsal.trajectory import Group, StopReason, ToolCall, Trajectory, Turn  # noqa: E402


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


def test_the_arms_of_the_tools_are_recipes() -> None:
    recipes = {
        arm: [resolve_recipe(name, {**tool_use_arms.COMMON, **part}) for part in parts]
        for arm, (name, parts) in tool_use_arms.ARMS.items()
    }
    for arm, parts in recipes.items():
        for recipe in parts:
            preset(recipe.algorithm.name, **recipe.algorithm.options)
            TaskSource(recipe)
            assert recipe.evaluation.episodes == 0, "held-out play is the experiment's own"
        if arm.startswith("abandoned"):
            assert [recipe.training.steps for recipe in parts] == [
                tool_use_arms.BROKEN_STEPS,
                tool_use_arms.MENDED_STEPS,
            ]
            assert {recipe.tools.cost for recipe in parts} == {tool_use_arms.COST}
    grpo, dapo, without = (recipes[f"calculate_{name}"][0] for name in ("grpo", "dapo", "without"))
    assert preset(grpo.algorithm.name, **grpo.algorithm.options).aggregation.kind == "sequence_mean"
    assert preset(dapo.algorithm.name, **dapo.algorithm.options).aggregation.kind == "token_mean"
    assert without.model_copy(update={"tools": grpo.tools}) == grpo, "nothing but the tool is missing"
    assert [recipe.world.mode for recipe in recipes["abandoned_placebo"]] == ["placebo", "placebo"]
    assert [TaskSource(recipe).locked for recipe in recipes["abandoned_curriculum"]] == [
        (tool_use_arms.UNRELIABLE,),
        (),
    ]


def test_a_call_pays_only_once_the_calculator_works() -> None:
    worth_broken = 1 - tool_use_arms.FAILS - tool_use_arms.COST
    assert worth_broken < 0, "even if every result were used well"
    # Of the calls that the base makes, three of five end in the right answer.
    assert 0.6 - tool_use_arms.COST > 0.2
    assert worth_broken + (1 - tool_use_arms.FAILS) * tool_use_arms.CREDIT > 0, "the credit outweighs it"


def test_every_episode_has_luck_of_its_own() -> None:
    def results(source: tool_use_arms.Unreliable, episodes: int) -> list[str]:
        call = ToolCall("calculator", {"expression": "2 + 3"})
        return [Toolbox(source.open()).execute(call).error for _ in range(episodes)]

    def later(source: tool_use_arms.Unreliable, calls: int) -> list[str]:
        """What the third episode meets, after two that called some times."""
        call = ToolCall("calculator", {"expression": "2 + 3"})
        boxes = [Toolbox(source.open()) for _ in range(3)]
        for box in boxes[:2]:
            for _ in range(calls):
                box.execute(call)
        return [boxes[2].execute(call).error for _ in range(8)]

    found = results(tool_use_arms.Unreliable(0.8, seed=1), 400)
    assert 0.75 < found.count("raised") / 400 < 0.85
    assert (
        found
        == results(tool_use_arms.Unreliable(0.8, seed=1), 400)
        != results(tool_use_arms.Unreliable(0.8, seed=2), 400)
    )
    assert later(tool_use_arms.Unreliable(0.5, seed=1), 0) == later(tool_use_arms.Unreliable(0.5, seed=1), 5)
    assert set(results(tool_use_arms.Unreliable(0.0), 50)) == {""}


def test_steps_to_half_do_not_lag() -> None:
    for middle in (2.0, 3.5, 6.0, 12.0):
        curve = [1 / (1 + math.exp(-(step - middle) / 0.7)) for step in range(40)]
        assert tool_use.steps_to_half(curve) == pytest.approx(middle, abs=0.15)
    # Of the end's success, not of what was gained.
    assert tool_use.steps_to_half([0.4, 0.4, 0.4] + [0.6] * 20) == 0.0
    assert math.isnan(tool_use.steps_to_half([0.0] * 20))
    run = {"success": [step / 10 for step in range(11)], "episodes": [100.0] * 5 + [200.0] * 6}
    assert tool_use.steps_to_half(run["success"]) == pytest.approx(4.0)
    assert tool_use.episodes_to_half(run) == pytest.approx(400.0)


def test_a_seed_without_a_value_is_counted_and_spoils_no_mean() -> None:
    figures = tool_use.told("x", [1.0, math.nan, 3.0])
    assert figures["x"] == 2.0 and figures["x_unknown"] == 1.0
    assert "x_unknown" not in tool_use.told("x", [1.0, 3.0])


def _tool_run(called: str, solved: str, after: float = 0.5, used: float = 0.5) -> dict[str, Any]:
    steps = tool_use_arms.BROKEN_STEPS + tool_use_arms.MENDED_STEPS
    return {
        "held_out": [solved, called, "sum of 1 digit,sum of 1 digit,product of 2 digits"],
        "after": after, "used": [used] * steps, "success": [0.0] * 5 + [1.0] * (steps - 5), "episodes": [128.0] * steps,
        "steps": [tool_use_arms.BROKEN_STEPS, tool_use_arms.MENDED_STEPS],
    }  # fmt: skip


def test_use_is_told_where_it_helps() -> None:
    runs = {"calculate_grpo": [_tool_run("011", "111")], "calculate_without": [_tool_run("000", "100")]}
    figures = tool_use.calculate_figures(runs)
    assert figures["calculate_grpo_used_where_needed"] == 1.0
    assert figures["calculate_grpo_used_where_not_needed"] == 0.0
    assert figures["calculate_grpo_called_sum_of_1_digit"] == 0.5
    assert figures["calculate_without_solved_product_of_2_digits"] == 0.0


def test_abandonment_is_told_against_controls() -> None:
    runs = {
        arm: [_tool_run("000", "000", after=0.1, used=0.0)] * 3
        for arm in tool_use_arms.ARMS
        if arm.startswith("abandoned")
    }
    runs["abandoned_working"] = [_tool_run("111", "111", after=0.9, used=1.0)] * 3
    runs["abandoned_credit"] = [_tool_run("111", "111", after=0.8, used=0.9)] * 3
    figures = tool_use.abandoned_figures(runs)
    assert figures["abandoned_broken_less_working_after"] == pytest.approx(-0.8)
    assert figures["abandoned_credit_less_broken_used_at_the_end"] == pytest.approx(0.9)
    assert figures["abandoned_best_cure_less_working_after"] == pytest.approx(-0.1)
    assert figures["abandoned_credit_chosen"] == 3.0
    assert figures["abandoned_working_used_after_33"] == 1.0
    told = {**figures, **dict.fromkeys(tool_use.GOALS, 0.0)}
    assert {name for name in tool_use.GOALS if "cure" in name} <= set(figures) <= set(told)


def test_the_best_cure_is_not_judged_on_the_luck_that_it_was_chosen_for() -> None:
    values = {"steady": [0.5, 0.5, 0.5], "lucky": [1.2, 0.2, 0.2]}
    assert tool_use.chosen_by_others(values) == ["steady", "lucky", "lucky"]


def test_every_goal_of_the_tools_has_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: dict[str, Any] = {}

    def played(name: str, cells: Mapping[str, Any], *others: Any) -> dict[str, Any]:
        json.dumps(cells)
        runs = {cell: _tool_run("111", "111", after=0.9, used=1.0) | {"before": 0.1} for cell in cells}
        return {cell: {**run, "one_hop_before": 0.1, "one_hop_after": 0.9} for cell, run in runs.items()}

    def told(name: str, figures: Mapping[str, float], goals: Mapping[str, str], *others: Any) -> dict[str, Any]:
        reported.update(figures=figures, goals=goals)
        return {"holds": True}

    monkeypatch.setattr(tool_use, "run_cells", played)
    monkeypatch.setattr(tool_use, "report", told)
    monkeypatch.setattr(sys, "argv", ["tool_use.py", "--seeds", "3"])
    tool_use.main()
    assert reported["goals"] == tool_use.GOALS
    assert all(isinstance(value, float | int) for value in reported["figures"].values())
    # Each question alone too, with the goals that it has figures for.
    for question in ("calculate", "lookup", "abandoned"):
        monkeypatch.setattr(sys, "argv", ["tool_use.py", "--only", question, "--seeds", "1"])
        tool_use.main()
        assert reported["goals"] and all(name.startswith(question) for name in reported["goals"])
