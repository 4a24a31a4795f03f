"""The parts of experiments that decide what is found: how a fall is dated, a detector judged, thresholds chosen."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import (  # noqa: E402  # noqa: E402
    collapse,
    filtering,
    helpdesk,
    helpdesk_figures,
    main_job,
    tool_use,
    tool_use_arms,
    world_model_rl,
)
from experiments import helpdesk_companies as companies_of  # noqa: E402
from experiments.cells import digest, run_cells  # noqa: E402
from experiments.intervals import seeds_interval, told  # noqa: E402
from experiments.policies import resolved  # noqa: E402
from experiments.turned import TURNED  # noqa: E402
from rehearsal.agents.toolbox import Toolbox  # noqa: E402
from rehearsal.algorithms.filters import make_filter  # noqa: E402
from rehearsal.algorithms.presets import preset  # noqa: E402
from rehearsal.diagnostics import Thresholds  # noqa: E402
from rehearsal.environments import helpdesk_words as words  # noqa: E402
from rehearsal.environments import make  # noqa: E402
from rehearsal.environments.check import check_env  # noqa: E402
from rehearsal.training.loop import Trainer  # noqa: E402
from rehearsal.training.recipe import resolve_recipe  # noqa: E402
from rehearsal.training.tasks import TaskSource  # noqa: E402
from rehearsal.trajectory import Group, Prediction, StopReason, ToolCall, Trajectory, Turn  # noqa: E402


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


def fall(settings: Mapping[str, Any]) -> dict[str, Any]:
    if settings["falls"]:
        raise ValueError("it fell")
    return {"stands": True}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_fails_keeps_no_other_from_being_stored(tmp_path: Path, workers: int) -> None:
    cells = {f"{number}": {"falls": number in (0, 3)} for number in range(5)}
    with pytest.raises(RuntimeError, match="these cells failed: "):
        run_cells("x", cells, fall, tmp_path, workers)
    assert sorted(file.stem for file in (tmp_path / "x").iterdir()) == ["1", "2", "4"]


def test_an_interval_over_seeds_is_students() -> None:
    mean, low, high = seeds_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, low, high) == pytest.approx((3.0, 3 - 1.9632, 3 + 1.9632), abs=1e-4)
    rng = np.random.default_rng(0)
    held = [low <= 0 <= high for _, low, high in map(seeds_interval, rng.normal(size=(2000, 5)).tolist())]
    assert 0.935 < np.mean(held) < 0.965
    assert seeds_interval([0.5])[0] == 0.5 and math.isnan(seeds_interval([0.5])[1]), "one seed tells no spread"
    assert all(math.isnan(value) for value in seeds_interval([]))
    assert seeds_interval([0.0] * 12) == (0.0, 0.0, 0.0)


def test_a_default_of_a_recipe_is_part_of_a_cell() -> None:
    assert resolved("frozenlake", {}) == resolved("frozenlake", {"evaluation.episodes": 256})
    assert resolved("frozenlake", {}) != resolved("frozenlake", {"evaluation.episodes": 128})


def test_what_a_cell_depends_on_beside_its_settings_has_a_digest() -> None:
    assert digest({"words": ["call"]}) == digest({"words": ["call"]}) != digest({"words": ["ring"]})
    world = companies_of.world_digest()
    with mock.patch.dict(words.PHRASES, {"pin": ("the pin",)}):
        assert companies_of.world_digest() != world
    assert companies_of.world_digest() == world


def test_the_arms_of_the_help_desk_are_recipes() -> None:
    names = {arm: resolve_recipe(None, {**helpdesk.COMMON, **changes}) for arm, changes in helpdesk.ARMS.items()}
    for arm, recipe in names.items():
        ranks = recipe.adapters.policy_rank + recipe.adapters.world_rank
        assert ranks == (32 if arm == "policy_only_32" else 64), arm
        make(recipe.environment.name, **recipe.environment.params)
    assert names["policy_only_32"].adapters.policy_rank == names["inactive"].adapters.policy_rank
    ours, placebo = names["dual_rehearse"].world.model_dump(), names["placebo"].world.model_dump()
    assert placebo == {**ours, "mode": "placebo"}, "nothing but the answers differs"
    assert {name for name, recipe in names.items() if recipe.world.foreseeable} == {
        name for name, recipe in names.items() if recipe.world.mode == "policy_only"
    }
    assert ours["updates"] > 1, "once is not enough to know what was said once"
    assert names["rehearse_only"].agent == names["placebo"].agent == names["dual_rehearse"].agent
    assert {helpdesk.STEPS["new"], helpdesk.STEPS["changed"]} <= set(companies_of.TESTED)


def test_only_companies_of_the_training_split_are_called_that_the_base_has_not_met() -> None:
    met = {
        make("helpdesk", world=companies_of.WORLD_OF_THE_BASE).unwrapped.company(i).name
        for i in range(companies_of.MET)
    }
    for span in (companies_of.LEAD_IN, companies_of.NEW, companies_of.MANY):
        env = make("helpdesk")
        called = companies_of.training_companies(span)
        assert {env.unwrapped.company(index).split for index in called} == {"train"}
        assert not met & {env.unwrapped.company(index).name for index in called}
        assert 0.7 * len(span) <= len(called) <= 0.8 * len(span) + 1


def test_a_company_is_tested_with_every_kind_of_matter_on_every_day() -> None:
    env = make("helpdesk")
    for company in companies_of.training_companies(companies_of.NEW):
        seen = []
        for task in companies_of.matters_of(company):
            env.reset(seed=task.seed, options=dict(task.options))
            assert env.describe()["company"] == env.unwrapped.company(company).name
            seen.append((env.describe()["matter"], env.describe()["day"]))
        for part, values in zip(zip(*seen, strict=True), (words.MATTERS, words.DAYS), strict=True):
            assert sorted(part) == sorted(values)


def test_a_person_needs_few_calls() -> None:
    companies = companies_of.training_companies(companies_of.NEW)
    new, changed = companies_of.person(companies, 0)
    assert len(new) == len(changed) == len(companies)
    # What was said once is known; some of it is said on some days alone.
    assert 1.0 <= np.mean(new) < 3.0
    assert np.median(new) == 1.0
    # Some want less than before: what is known of them still serves.
    assert 0.5 <= np.mean(changed) < 3.0
    assert companies_of.person(companies, 0) == (new, changed)


def test_companies_that_a_guess_serves_tell_nothing() -> None:
    companies = companies_of.training_companies(companies_of.NEW)
    guessed = companies_of.guessable(companies, {})
    assert 0 < len(guessed) < len(companies) * 0.7
    env = make("helpdesk")
    wanted = {fact for index in guessed for fact in env.company(index).requirement.always}
    assert len(wanted) <= companies_of.GUESSED
    assert guessed != companies_of.guessable(companies, companies_of.CHANGED)
    runs = [{"start": [0.0, 0.9, 0.0, 0.2, 0.0]}, {"start": [0.0, 0.0, 0.6, 1.0, 0.0]}]
    found = helpdesk_figures.counted([50, 51, 52, 53, 54], runs, {50}, [1, 1, 2, 1, 0])
    assert found == [2], "no guess, and neither an arm nor the person before the first call"


def test_a_company_is_served_where_two_tests_running_say_so() -> None:
    record = helpdesk.Record([1, 2, 3, 4])
    record.add(0, [0.8, 0.2, 0.0, 0.6])
    record.add(2, [0.4, 0.8, 0.0, 1.0])  # the first was luck
    record.add(4, [0.8, 1.0, 0.0, 1.0])
    assert record.unserved == [1, 3]
    record.add(6, [1.0, 0.8])
    assert record.calls == [4, 2, None, 2], "a single test at the end dates nothing"
    assert record.failed == [2, 0, 4, 0]


def test_what_an_agent_foretold_is_compared_with_what_is_wanted() -> None:
    def episode(text: str, *executed: str) -> Trajectory:
        first = Turn("", executed=list(executed), predictions=[Prediction(("call",), text, 5, 9)])
        return Trajectory("helpdesk", 0, turns=[first], success=False)

    found = helpdesk.outcome_of(episode("Clerk: We need your PIN code and the card.", "ask pin"), ("card", "pin"))
    assert found == helpdesk.Outcome(settled=False, gathered=False, foretold=True)
    found = helpdesk.outcome_of(episode("Clerk: We need a pinboard.", "ask pin", "look up card"), ("card", "pin"))
    assert found == helpdesk.Outcome(settled=False, gathered=True, foretold=False)
    silent = Trajectory("helpdesk", 0, turns=[Turn("", predictions=[Prediction(("ask pin",), "the pin", 5, 9)])])
    assert helpdesk.outcome_of(silent, ("pin",)).foretold is None, "what a customer says is no company's wish"


def test_one_stubborn_company_does_not_decide() -> None:
    companies = companies_of.training_companies(companies_of.NEW)
    steps = {"new": 60, "changed": 40}
    foretold = [0.0] * 60
    shares = dict.fromkeys(helpdesk_figures.SHARES, 0.5)

    guessed = companies_of.guessable(companies, {})
    stubborn = next(place for place, company in enumerate(companies) if company not in guessed)

    def cell(quick: int) -> dict[str, Any]:
        calls: list[int | None] = [quick] * len(companies)
        calls[stubborn] = None
        failed = [quick - 2 if quick else None] * len(companies)
        phase = {"calls": calls, "failed": failed, "start": [0.0] * len(companies), "foretold": foretold}
        return {"new": phase, "changed": phase, **shares}

    assert helpdesk.ARMS["no_replay"] == {**helpdesk.ARMS["dual_rehearse"], "world.replay": 0}
    played = {"dual_rehearse-0": cell(2), "dual_rehearse-1": cell(4), "policy_only-0": cell(40), "placebo-0": cell(40)}
    played |= {"policy_only-1": cell(40), "placebo-1": cell(6)}
    arms = {"dual_rehearse": 2, "policy_only": 2, "placebo": 2}
    figures = helpdesk_figures.figures_of(played, arms, companies, steps)
    assert figures["dual_rehearse_new_calls"] == 3.0
    assert figures["dual_rehearse_new_mean_calls"] > 6.0, "the bound of what was tried counts in the mean"
    assert figures["policy_only_new_calls"] == 40.0
    assert figures["dual_rehearse_new_calls_at_least"] == 2.0, "one more than at the last test that was failed"
    difference = figures["placebo_minus_dual_rehearse_new_mean_calls"]
    assert 10 < difference < 38
    assert figures["placebo_minus_dual_rehearse_new_mean_calls_low"] < 0, "two seeds do not tell"
    assert 0 < figures["new_companies_counted"] < len(companies)
    assert figures["dual_rehearse_new_foretold_after_4"] == 0.0
    assert "dual_rehearse_changed_foretold_after_40" not in figures


def test_a_level_is_reached_where_a_curve_stays_at_it() -> None:
    curve = [[0.0, 0.2], [100.0, 0.4], [200.0, 0.8]]
    assert world_model_rl.episodes_to(curve, 0.6) == pytest.approx(150.0)
    assert world_model_rl.episodes_to(curve, 0.4) == pytest.approx(100.0)
    assert math.isnan(world_model_rl.episodes_to(curve, 0.1)), "nothing was learnt on the way to it"
    assert math.isnan(world_model_rl.episodes_to(curve, 0.9))
    lucky = [[0.0, 0.2], [100.0, 0.7], [200.0, 0.4], [300.0, 0.8]]
    assert world_model_rl.episodes_to(lucky, 0.6) == pytest.approx(250.0)
    mean = world_model_rl.mean_curve([{"curve": curve}, {"curve": [[0.0, 0.4], [100.0, 0.6]]}])
    assert [point[0] for point in mean] == [0.0, 100.0, 200.0]
    assert [point[1] for point in mean] == pytest.approx([0.3, 0.5, 0.8])
    assert world_model_rl.area(curve) == pytest.approx(0.45)


def curves(*ends: float, start: float = 0.2) -> list[dict[str, Any]]:
    """Runs that go straight to an end."""
    return [{"curve": [[0.0, start], [50.0, (start + end) / 2], [100.0, end]]} for end in ends]


def test_an_arm_is_held_to_a_part_of_what_rewards_alone_gain() -> None:
    reference = curves(0.6, 0.6, 0.6)
    assert world_model_rl.episodes_over(reference, reference) == pytest.approx(1.0)
    # Level 0.5: after 75 episodes alone, after 37.5 where it is learnt twice as fast.
    assert world_model_rl.episodes_over(curves(1.0, 1.0, 1.0), reference) == pytest.approx(0.5)
    assert world_model_rl.episodes_over(curves(0.3, 0.3, 0.3), reference) == math.inf
    assert math.isnan(world_model_rl.episodes_over(curves(1.0, start=0.55), reference)), "it started above"
    assert math.isnan(world_model_rl.episodes_over(reference, curves(0.3, 0.3, 0.3))), "too little gain to be measured"
    middle, low, high, unmeasurable = world_model_rl.ratio_interval(curves(1.0, 0.9, 0.2), reference)
    assert low < middle < high == math.inf, "some draws of seeds never get there"
    assert unmeasurable == 0.0


def test_the_arms_of_the_world_model_are_recipes() -> None:
    for environment in world_model_rl.ENVIRONMENTS.values():
        limits = set()
        for arm, changes in world_model_rl.ARMS.items():
            recipe = resolve_recipe(
                environment["recipe"], {**world_model_rl.COMMON, **environment["overrides"], **changes}
            )
            ranks = recipe.adapters.policy_rank + recipe.adapters.world_rank
            assert ranks == (32 if arm == "policy_only_32" else 64), arm
            assert 0 < environment["first"] < recipe.training.steps
            assert recipe.training.steps % recipe.evaluation.every == 0
            assert recipe.evaluation.episodes == recipe.evaluation.validation_episodes
            limits.add((recipe.agent.max_tokens_per_turn, recipe.agent.max_context))
        assert len(limits) == 1
    ours, placebo = (world_model_rl.ARMS[arm] for arm in ("dual_rehearse", "placebo_rehearse"))
    assert placebo == {**ours, "world.mode": "placebo"}
    assert set(world_model_rl.PLACEBOS.items()) <= set(world_model_rl.PAIRS), "each against its own placebo"


@pytest.mark.parametrize(("name", "plain"), [("TurnedLake", "frozenlake"), ("TurnedSokoban", "sokoban")])
def test_turned_worlds_differ_in_where_moves_go_alone(name: str, plain: str) -> None:
    made = f"experiments.turned:{name}"
    assert check_env(make(made)).ok
    turned, other = make(made), make(plain)
    for seed in range(10):
        assert turned.reset(seed=seed)[0] == other.reset(seed=seed)[0]
        plan = turned.oracle() or []
        assert [TURNED[move] for move in plan] == other.oracle()
        for move in plan:
            seen, _, over, _, info = turned.step(move)
            assert seen == other.step(TURNED[move])[0]
            assert info["foreseeable"] is False
        assert over
        assert info["success"]
    assert turned.instructions == other.instructions
    assert any(TURNED[move] != move for move in TURNED)
    assert sorted(TURNED) == sorted(TURNED.values())
    assert all(TURNED[TURNED[move]] == move for move in TURNED)


def test_an_arm_is_judged_by_the_same_tasks_whenever_it_is_judged() -> None:
    asked: list[tuple[str, int]] = []
    trainer = world_model_rl.Judged.__new__(world_model_rl.Judged)
    trainer.steps_done = 0
    with mock.patch.object(Trainer, "evaluate", lambda self, split, episodes: asked.append((split, episodes))):
        trainer.evaluate("test", 8)
        trainer.steps_done = 2
        trainer.evaluate("validation", 8)
        trainer.steps_done, trainer.goes_on = 0, True
        trainer.evaluate("test", 8)
    assert asked == [("test", 8), ("test", 8)], "one that goes on has been judged already"


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
            price = 0.0 if "free" in arm else tool_use_arms.COST
            assert [recipe.tools.cost for recipe in parts] == [0.0 if arm == "abandoned_late_price" else price, price]
    grpo, dapo, without = (recipes[f"calculate_{name}"][0] for name in ("grpo", "dapo", "without"))
    assert preset(grpo.algorithm.name, **grpo.algorithm.options).aggregation.kind == "sequence_mean"
    assert preset(dapo.algorithm.name, **dapo.algorithm.options).aggregation.kind == "token_mean"
    assert without.model_copy(update={"tools": grpo.tools}) == grpo, "nothing but the tool is missing"
    assert [recipe.world.mode for recipe in recipes["abandoned_placebo"]] == ["placebo", "placebo"]
    assert [TaskSource(recipe).locked for recipe in recipes["abandoned_curriculum"]] == [
        (tool_use_arms.UNRELIABLE,),
        (tool_use_arms.UNRELIABLE,),
    ], "how far it has come is taken from part to part"


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
    figures = told("x", [1.0, math.nan, 3.0])
    assert figures["x"] == 2.0 and figures["x_unknown"] == 1.0
    assert "x_unknown" not in told("x", [1.0, 3.0])


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
