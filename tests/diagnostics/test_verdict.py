"""The rules, on runs made up for each of them, and their hysteresis."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.diagnostics import RULE_NAMES, RULES, Rule, Series, Thresholds, Watch, judge, unheard
from rehearsal.training.gradient_probe import gradient_figures

HEALTHY: dict[str, Callable[[int], float]] = {
    "signal/dead_groups": lambda i: 0.2 + 0.2 * i / 60,
    "signal/dead_groups_solved": lambda i: 0.2 * i / 60,
    "signal/dead_groups_failed": lambda i: 0.2 - 0.1 * i / 60,
    "signal/reward_std_in_group": lambda i: 0.35 - 0.1 * i / 60,
    "train/reward": lambda i: 0.2 + 0.6 * i / 60,
    "train/success": lambda i: 0.2 + 0.6 * i / 60,
    "behaviour/entropy": lambda i: 0.2 - 0.1 * i / 60,
    "policy/grad_norm": lambda i: 0.3,
    "policy/mismatch_first": lambda i: 1e-6,
    "policy/moved": lambda i: 1e-3,
    "signal/success_correlation": lambda i: 0.9,
    "behaviour/thought_tokens": lambda i: 20.0,
    "behaviour/invalid_turns": lambda i: 0.02,
    "information/first/sequence/share": lambda i: 0.95,
    "information/first/sequence/conditional_entropy": lambda i: 3.0,
    "information/first/sequence/retrieval": lambda i: 0.95,
    "gradient/policy/snr": lambda i: 0.4,
    "gradient/policy/norm": lambda i: 0.1,
    "probe/perplexity": lambda i: 1.5,
    "probe/symbols": lambda i: 13.0,
    "train/episodes": lambda i: 256.0,
    "train/tools/calls": lambda i: 0.8,
    "train/tools/calculator/used": lambda i: 0.4 + 0.4 * i / 60,
    "train/tools/calculator/failures": lambda i: 0.3,
}
"""A run of sixty steps that gets better."""


def run(steps: int = 60, **changes: Callable[[int], float]) -> list[dict[str, float]]:
    """The healthy run with some figures changed; ``a__b`` stands for the name a/b."""
    series = HEALTHY | {name.replace("__", "/"): values for name, values in changes.items()}
    return [{"step": i + 1, **{name: values(i) for name, values in series.items()}} for i in range(steps)]


def names(rows: list[dict[str, float]]) -> set[str]:
    return {verdict.rule.name for verdict in judge(rows)}


def late(before: float, after: float, begin: int = 30) -> Callable[[int], float]:
    return lambda i: before if i < begin else after


def risen_and_fallen(i: int) -> float:
    return 0.2 + i / 100 if i < 30 else 0.3


def test_a_healthy_run_has_no_verdict() -> None:
    assert names(run()) == set()


def test_a_world_is_foreign_by_environment() -> None:
    figures: dict[str, Callable[[int], float]] = {
        "probe__lake__perplexity": late(1.5, 40.0), "probe__lake__symbols": lambda i: 13.0,
        "probe__bandit__perplexity": late(1.5, 50.0), "probe__bandit__symbols": lambda i: 60.0,
    }  # fmt: skip
    rows = run(**figures)
    for row in rows:
        del row["probe/perplexity"], row["probe/symbols"]
    (verdict,) = judge(rows)
    assert (verdict.rule.name, verdict.began) == ("foreign_world", 31)
    assert verdict.evidence == "The perplexity of what lake answers is 40, and it has 13 symbols."
    # Between probes nothing is judged, and a run without any is told that this was not looked at.
    for row in rows[31:]:
        row.pop("probe/lake/perplexity"), row.pop("probe/bandit/perplexity")
    assert judge(rows)[0].ended is None
    assert "foreign_world" not in {rule.name for rule in unheard(Series(rows)).unmeasured}
    assert "foreign_world" in {rule.name for rule in unheard(Series([{"step": 1, "train/reward": 1.0}])).unmeasured}


def test_one_step_that_went_too_far_is_no_verdict() -> None:
    assert names(run(policy__moved=lambda i: 0.2 if i in (20, 41) else 1e-3)) == set()
    assert names(run(policy__moved=lambda i: 0.02 if i % 5 in (0, 2, 4) else 1e-3)) == {"large_steps"}


SICK: dict[str, dict[str, Callable[[int], float]]] = {
    "too_easy": {"signal__dead_groups": late(0.3, 0.95), "signal__dead_groups_solved": late(0.2, 0.9)},
    "too_hard": {"signal__dead_groups": late(0.3, 0.9), "signal__dead_groups_failed": late(0.2, 0.85)},
    "no_signal": {
        "signal__dead_groups": late(0.3, 0.9), "signal__dead_groups_equal": late(0.0, 0.5),
        "signal__dead_groups_solved": late(0.0, 0.2), "signal__dead_groups_failed": late(0.0, 0.2),
    },
    "all_or_nothing": {
        "signal__dead_groups": late(0.3, 0.85), "signal__dead_groups_solved": late(0.1, 0.43),
        "signal__dead_groups_failed": late(0.1, 0.42), "train__success": lambda i: 0.5,
    },
    "prompt_ignored": {
        "information__first__sequence__share": lambda i: 0.02,
        "information__first__sequence__mutual_information": lambda i: 0.04,
        "information__first__sequence__standard_error": lambda i: 0.05,
        "information__first__sequence__retrieval": lambda i: 0.15,
    },
    "template_collapse": {
        "information__first__sequence__share": late(0.9, 0.1),
        "information__first__sequence__conditional_entropy": late(3.0, 2.5),
    },
    "entropy_collapse": {"behaviour__entropy": late(0.2, 0.01), "train__success": lambda i: 0.4},
    "entropy_rise": {"behaviour__entropy": late(0.2, 0.7)},
    "success_unpaid": {"signal__success_correlation": late(0.9, -0.02)},
    "large_steps": {"policy__moved": late(1e-3, 0.03)},
    "no_progress": {"train__reward": lambda i: 0.5 if 5 <= i < 28 else 0.2},
    "echo_trap": {"signal__reward_std_in_group": late(0.35, 0.05), "train__reward": risen_and_fallen},
    "noise": {"gradient__kl__norm": late(0.01, 0.5)},
    "length_drift": {"behaviour__thought_tokens": late(20, 45)},
    "format_lost": {"behaviour__invalid_turns": late(0.02, 0.4)},
    "disagreement": {"policy__mismatch_first": late(1e-6, 0.1)},
    "success_fell": {"train__success": late(0.6, 0.3)},
    "sure_and_worse": {"signal__self_certainty": late(2.0, 3.0), "train__reward": risen_and_fallen},
    "foreign_world": {"probe__perplexity": late(1.5, 40.0)},
    "nothing_to_foretell": {"world__target_tokens": late(900.0, 0.0)},
    "tool_abandoned": {"train__tools__calculator__used": late(0.6, 0.05), "train__success": lambda i: 0.4},
}  # fmt: skip


@pytest.mark.parametrize("name", RULE_NAMES)
def test_each_rule_on_a_run_that_has_it(name: str) -> None:
    verdicts = judge(run(**SICK[name]))
    assert {verdict.rule.name for verdict in verdicts} == {name}
    verdict = verdicts[0]
    if name == "prompt_ignored":
        assert verdict.began == verdict.called < 31, "it is so from the beginning, and said after four looks"
    else:
        assert 31 <= verdict.began <= verdict.called <= 42, "averages look back a few steps"
    assert verdict.ended is None
    text = verdict.text()
    assert text.startswith(verdict.rule.title)
    assert text.endswith(".")
    assert any(character.isdigit() for character in verdict.evidence)


@pytest.mark.parametrize(
    "changes",
    [
        # Thoughts that are short and sure are not a template: low I with low H(Z|X).
        {
            "information__first__sequence__share": late(0.9, 0.1),
            "information__first__sequence__conditional_entropy": late(3.0, 0.5),
        },
        # A policy that is good may be sure.
        {"behaviour__entropy": late(0.2, 0.01), "train__success": lambda i: 0.95},
        # Spread falls because everything succeeds.
        {"signal__reward_std_in_group": late(0.35, 0.05), "train__reward": lambda i: min(0.98, 0.5 + i / 60)},
        # Few prompts and much scatter: nothing is certain.
        {
            "information__first__sequence__share": lambda i: 0.08,
            "information__first__sequence__mutual_information": lambda i: 0.16,
            "information__first__sequence__standard_error": lambda i: 0.05,
        },
        # A run that has learned most of its tasks.
        {"signal__dead_groups": late(0.3, 0.82), "signal__dead_groups_solved": late(0.2, 0.72)},
        # An agent that learned to do without a tool, and one that had nothing left to gain by it.
        {"train__tools__calculator__used": late(0.6, 0.02)},
        {"train__tools__calculator__used": late(0.6, 0.02), "train__success": lambda i: 0.9},
        # One bad batch.
        {"train__success": lambda i: 0.1 if i == 40 else 0.6, "behaviour__invalid_turns": lambda i: 0.5 * (i == 40)},
    ],
)
def test_what_looks_alike_and_is_not(changes: dict[str, Callable[[int], float]]) -> None:
    assert names(run(**changes)) == set()


def noisy_rows(ratio: float | None, every: int, steps: int = 60, **changes: Callable[[int], float]) -> list[Any]:
    """A run that gets nowhere, with a look at its gradients now and then; None for rewards without any gradient."""
    found = run(steps, **{"train__reward": lambda i: 0.3, "train__success": lambda i: 0.3} | changes)
    for i, row in enumerate(found):
        del row["gradient/policy/snr"], row["gradient/policy/norm"]
        if i % every == 0:
            row["gradient/policy/norm"] = 0.0 if ratio is None else 0.1
            if ratio is not None:
                row["gradient/policy/snr"] = ratio
    return found


def noisy(rows: list[dict[str, float]]) -> list[int]:
    """The steps at which it was called. That the reward stays where it was is told by a rule of its own."""
    return [verdict.called for verdict in judge(rows) if verdict.rule.name == "noise"]


def test_a_noisy_gradient_needs_several_looks() -> None:
    assert noisy(noisy_rows(0.0, 30)) == []
    assert noisy(noisy_rows(0.0, 5)) == [16]
    better = late(0.3, 0.6, begin=5)
    assert noisy(noisy_rows(0.0, 5, train__reward=better)) == [], "a run that learns has a signal"
    assert noisy(noisy_rows(0.3, 5)) == []


def test_four_looks_are_enough_to_judge_noise() -> None:
    assert noisy(noisy_rows(0.0, 10, 30)) == []
    early = unheard(Series(noisy_rows(0.0, 10, 30))).early
    assert "noise" in [rule.name for rule in early]
    assert noisy(noisy_rows(0.0, 10, 40)) == [31]
    assert "noise" not in [rule.name for rule in unheard(Series(noisy_rows(0.3, 10, 40))).early]
    one_finds_some = noisy_rows(0.0, 10, 40)
    one_finds_some[30]["gradient/policy/snr"] = 0.3
    assert noisy(one_finds_some) == []


def test_rewards_without_any_gradient_beside_terms_that_have_one() -> None:
    """The textbook case: equal rewards have exactly none, so there is no ratio of signal and noise either."""
    sums = gradient_figures(
        [[0], [1]], np.zeros(2), iter([{"policy": [torch.zeros(2)], "kl": [torch.ones(2)]} for _ in range(2)])
    )
    assert sums["gradient/policy/norm"] == 0.0
    assert "gradient/policy/snr" not in sums
    rows = [{"step": step, **(sums if step % 10 == 1 else {})} for step in range(1, 21)]
    (verdict,) = judge(rows)
    assert (verdict.rule.name, verdict.began, verdict.called) == ("noise", 1, 11)
    assert verdict.evidence == "Beside the gradient of the KL term the rewards give next to none."
    # Where nothing else moves the weights, dead groups are told by rules of their own.
    assert noisy(noisy_rows(None, 5)) == []


def test_looks_without_a_ratio_are_none_that_find_nothing() -> None:
    rows = noisy_rows(0.0, 10, 40)
    del rows[30]["gradient/policy/snr"]
    rows[30]["gradient/policy/norm"] = 0.0
    assert noisy(rows) == []


def test_a_reward_that_a_curriculum_holds_is_no_evidence_of_noise() -> None:
    chosen: dict[str, Any] = {"curriculum__adaptive": lambda i: 1.0}
    assert noisy(noisy_rows(0.0, 5, **chosen)) == []
    assert noisy(noisy_rows(0.3, 5, **chosen, gradient__entropy__norm=lambda i: 0.5)) == [6]


def echo(spread_falls: int, reward_falls: int, **changes: Callable[[int], float]) -> list[Any]:
    rows = run(
        signal__reward_std_in_group=late(0.35, 0.05, spread_falls),
        train__reward=lambda i: min(0.5, 0.2 + i / 60) if i < reward_falls else 0.25,
        train__success=lambda i: 0.4, **changes,
    )  # fmt: skip
    return [verdict for verdict in judge(rows) if verdict.rule.name == "echo_trap"]


def test_in_an_echo_trap_the_spread_falls_first() -> None:
    for earlier in (0, 1, 2, 5, 15):
        (verdict,) = echo(35 - earlier, 35)
        assert 36 <= verdict.began <= 38, "when both have fallen"
    for later in (3, 5, 15):
        assert echo(35 + later, 35) == [], "what is left after the fall of the reward differs less"


def test_the_order_of_two_falls_is_told_in_spite_of_scatter() -> None:
    rng = random.Random(3)

    def scattered(apart: int) -> bool:
        spread, reward = ([rng.gauss(0, size) for _ in range(60)] for size in (0.02, 0.04))
        rows = run(
            signal__reward_std_in_group=lambda i: late(0.35, 0.1, 30 + apart)(i) + spread[i],
            train__reward=lambda i: late(0.6, 0.4, 30)(i) + reward[i], train__success=lambda i: 0.4,
        )  # fmt: skip
        return "echo_trap" in names(rows)

    assert sum(scattered(0) for _ in range(40)) >= 38
    assert sum(scattered(-6) for _ in range(40)) >= 38
    assert sum(scattered(8) for _ in range(40)) <= 2


def test_a_jump_of_the_gradient_is_evidence_and_no_condition() -> None:
    (calm,) = echo(30, 35)
    assert "gradient" not in calm.evidence
    (jump,) = echo(30, 35, policy__grad_norm=late(0.3, 3.0, 34))
    assert jump.evidence.endswith("The gradient has jumped to 10.0 times its median.")
    assert jump.called == calm.called


def flag(values: list[Any]) -> list[dict[str, float]]:
    return [{"step": i + 1, **({} if value is None else {"x": value})} for i, value in enumerate(values)]


FLAG = Rule("flag", "Flag", "It is up.", "Take it down.", "x", lambda s, _: "1" if s.last("x") > 0 else None, 3, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 1, 0, 1, 1, 0], []),
        ([0, 1, 1, 1, 0, 1, 0, 0, 1], [(2, 4, 6)]),
        ([1, 1, 1, 0, 0, 1, 1, 1, 1], [(1, 3, 3), (6, 8, None)]),
        # A step in which nothing was measured counts neither way.
        ([1, None, 1, None, None, 1, None, 0, None, 1], [(1, 6, None)]),
        ([], []),
    ],
)
def test_hysteresis(values: list[Any], expected: list[tuple[int, int, int | None]]) -> None:
    found = judge(flag(values), rules=[FLAG])
    assert [(verdict.began, verdict.called, verdict.ended) for verdict in found] == expected


@given(st.lists(st.sampled_from([0, 1, None]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_what_was_said_of_a_step_stays_said(values: list[Any]) -> None:
    whole = judge(flag(values), rules=[FLAG])
    for count in range(len(values)):
        earlier = judge(flag(values[:count]), rules=[FLAG])
        assert [v.called for v in earlier] == [v.called for v in whole if v.called <= count]


def test_live_and_from_files_are_the_same() -> None:
    rows = run(**SICK["format_lost"], **SICK["length_drift"])
    watch, seen = Watch(), []
    for count in range(1, len(rows) + 1):
        seen += watch.look(Series(rows[:count]))
    assert watch.verdicts == judge(rows)
    assert [verdict.called for verdict in seen] == sorted(verdict.called for verdict in seen)


def test_metrics_that_are_missing_or_odd() -> None:
    assert judge([]) == []
    assert judge([{"step": 1}]) == []
    rows = run(40)
    for row in rows[5:]:
        row.clear()
        row["step"] = 7
    assert judge(rows) == []
    odd: list[dict[str, Any]] = [
        {"step": i + 1, "train/success": "high", "behaviour/entropy": None, "signal/dead_groups": math.nan, "x": True}
        for i in range(20)
    ]
    assert judge(odd) == []


def test_two_rules_never_fire_on_scrambled_health() -> None:
    """The healthy run with noise of the size that a batch of 256 episodes has."""
    rng = random.Random(0)
    for _ in range(20):
        rows = run()
        for row in rows:
            for name in row:
                if name != "step":
                    row[name] *= 1 + 0.1 * rng.gauss(0, 1)
        assert names(rows) == set()


def test_series() -> None:
    series = Series([{"step": 1, "x": 1.0}, {"step": 2}, {"step": 5, "x": 3.0}, {"step": 6, "x": 5.0}])
    assert (series.step, len(series)) == (6, 4)
    assert series.measured("x").tolist() == [1, 3, 5]
    assert series.recent("x", 2) == 4.0
    assert math.isnan(series.recent_median("y"))
    assert series.start("x", 3) == 3.0
    assert math.isnan(series.start("x", 4))
    assert series.best("x", 2) == 4.0
    assert math.isnan(series.best("x", 4))
    assert not series.until(2).fresh("x")
    assert series.until(3).last("x") == 3.0
    assert series.until(3).step == 5
    assert math.isnan(series.fell_at("x", 1)), "it rises"
    falls = Series([{"step": i + 1, "x": value} for i, value in enumerate([5.0, 1.0, 5.0, 5.0, 2.0, 2.0])])
    assert falls.fell_at("x", 1) == 4.0, "the last time"
    assert falls.fell_at("x", 2) == 4.0
    assert math.isnan(falls.fell_at("x", 7))
    assert math.isnan(Series([]).last("x"))
    assert math.isnan(series.recent("y"))


def test_falls_and_rises_are_told_from_chance() -> None:
    rng = random.Random(1)

    def series(values: list[float]) -> Series:
        return Series([{"step": i + 1, "x": value} for i, value in enumerate(values)])

    flat = [[0.5 + rng.gauss(0, 0.1) for _ in range(50)] for _ in range(200)]
    # The best mean of five lies above the others by chance, rarely by three standard errors of the difference.
    assert sum(series(values).fall("x") > Thresholds().certain for values in flat) < 20
    assert sum(series(values).rise("x") > 2.5 for values in flat) < 6
    fallen = [[*values[:25], *(value - 0.3 for value in values[25:])] for values in flat]
    assert all(series(values).fall("x") > 2.5 for values in fallen)
    risen = [[value + 0.01 * i for i, value in enumerate(values)] for values in flat]
    assert all(series(values).rise("x") > 2.5 for values in risen)
    assert math.isnan(series([1.0] * 4).fall("x")) and math.isnan(series([1.0] * 19).rise("x"))
    assert series([1.0] * 30).fall("x") == series([1.0] * 30).rise("x") == 0.0
    assert series([1.0] * 20 + [0.0] * 5).fall("x") > 2.5


def test_rules_of_terms_that_drown_the_rewards() -> None:
    told = [verdict.evidence for verdict in judge(run(gradient__kl__norm=late(0.01, 0.5)))]
    assert "times that of the rewards" in told[0]
    told = [
        verdict.evidence
        for verdict in judge(run(gradient__kl__norm=late(0.01, 0.5), gradient__policy__norm=lambda i: 1e-5))
    ]
    assert told == ["Beside the gradient of the KL term the rewards give next to none."]


def test_the_docs_say_what_each_rule_suggests() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "diagnostics.md").read_text()
    for rule in RULES:
        assert f"| `{rule.name}` | " in page
        assert f" | {rule.suggestion} |" in page, f"what {rule.name} suggests has changed; change docs/diagnostics.md"


def test_whoever_is_sent_back_is_told_how() -> None:
    """Resuming goes on from the newest checkpoint and refuses another algorithm or filter."""
    back = {rule.name for rule in RULES if "checkpoint" in rule.suggestion}
    assert {"template_collapse", "entropy_collapse", "entropy_rise", "echo_trap", "success_fell"} < back
    for rule in RULES:
        if rule.name in back:
            assert "rehearsal export RUN FOLDER --step N, then --model.path FOLDER" in rule.suggestion
        assert "--resume" not in rule.suggestion


def test_a_series_grows_as_if_it_had_been_made_whole() -> None:
    rows = run(train__reward=late(0.3, 0.5))
    grown = Series(())
    for count, row in enumerate(rows, start=1):
        grown.append(row)
        whole = Series(rows[:count])
        for name in ("train/reward", "behaviour/entropy", "nothing"):
            assert np.array_equal(grown.values(name), whole.values(name), equal_nan=True)
        assert grown.step == whole.step
    assert np.array_equal(grown.until(7).values("train/reward"), Series(rows[:7]).values("train/reward"))


def test_every_rule_is_written_out() -> None:
    for rule in RULES:
        assert rule.sentence.endswith(".")
        assert rule.suggestion.endswith(".")
        assert rule.name in SICK
    assert Thresholds() == Thresholds()


# How soon rules speak


def test_a_reward_that_ceases_to_pay_is_called_in_a_few_steps() -> None:
    scatter = random.Random(0)
    rows = run(signal__success_correlation=lambda i: 0.9 if i < 30 else scatter.gauss(0, 0.09))
    (verdict,) = judge(rows)
    assert verdict.rule.name == "success_unpaid"
    assert 31 <= verdict.called <= 34
    assert "fell from 0.90" in verdict.evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"signal__success_correlation": lambda i: 0.9 if i != 30 else -0.1},
        {"signal__success_correlation": late(0.45, 0.1)},
        {"signal__success_correlation": late(0.9, 0.15), "train__success": late(0.7, 0.9)},
    ],
    ids=["a single look", "never paid much", "nearly all succeed"],
)
def test_a_correlation_that_falls_means_nothing_where(changes: dict[str, Callable[[int], float]]) -> None:
    assert "success_unpaid" not in names(run(**changes))


def test_large_steps_are_called_with_the_third_look_and_a_single_one_never() -> None:
    (verdict,) = judge(run(policy__moved=lambda i: 0.05))
    assert (verdict.rule.name, verdict.called) == ("large_steps", 3)
    assert judge(run(policy__moved=lambda i: 0.05 if i in (0, 20, 40) else 1e-3)) == []


def test_what_a_few_odd_steps_can_feign_has_to_last() -> None:
    """Dead groups and echo traps go by means of five steps, which one step's tasks move for as long."""
    odd = run(signal__dead_groups=lambda i: 1.0 if 20 <= i < 26 else 0.3, signal__dead_groups_failed=lambda i: 0.3)
    assert judge(odd) == []
    for rule in RULES:
        if rule.needs == "signal/dead_groups" or rule.name in ("echo_trap", "success_fell"):
            assert rule.begins_after == 5
