"""What a curriculum does by design is nothing wrong with the policy."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from rehearsal.diagnostics import Series, judge, unheard

STAGE, ADAPTIVE = "curriculum/stage", "curriculum/adaptive"


def run(steps: int = 60, **figures: Callable[[int], float]) -> list[dict[str, float]]:
    named = {name.replace("__", "/"): values for name, values in figures.items()}
    return [{"step": i + 1, **{name: values(i) for name, values in named.items()}} for i in range(steps)]


def names(rows: list[dict[str, float]]) -> set[str]:
    return {verdict.rule.name for verdict in judge(rows)}


def scatter(seed: int, size: float = 0.02) -> Callable[[int], float]:
    rng = random.Random(seed)
    drawn = [rng.gauss(0, size) for _ in range(200)]
    return lambda i: drawn[i]


def staged(i: int, begin: int = 30) -> float:
    """The stage after a step. The one before ``begin``, counted from 0, brings the next stage on."""
    return float(i >= begin - 1)


def test_a_harder_stage_is_no_fall() -> None:
    noise = scatter(0)

    def success(i: int) -> float:
        return (0.2 + 0.02 * i if i < 30 else 0.3 + 0.012 * (i - 30)) + noise(i)

    figures = {
        "train__success": success, "train__reward": success,
        "signal__reward_std_in_group": lambda i: 0.35 if i < 30 else 0.15,
        "policy__entropy": lambda i: 0.1 if i < 30 else 0.3,
        "behaviour__thought_tokens": lambda i: 20.0 if i < 30 else 45.0,
        "behaviour__invalid_turns": lambda i: 0.02 if i < 30 else 0.3,
    }  # fmt: skip
    assert names(run(**figures)) > {"success_fell", "echo_trap"}, "in one stage all of it would be told"
    assert names(run(**figures, curriculum__stage=staged)) == set()


def test_a_stage_that_gets_nowhere_or_falls_is_told() -> None:
    noise = scatter(1)

    def rises_then(i: int, then: float) -> float:
        return (0.2 + 0.02 * i if i < 30 else then) + noise(i)

    stuck = run(
        train__success=lambda i: rises_then(i, 0.3),
        train__reward=lambda i: rises_then(i, 0.3),
        curriculum__stage=staged,
    )
    (verdict,) = judge(stuck)
    assert (verdict.rule.name, verdict.called) == ("no_progress", 30 + 20 + 4), "twenty steps of the stage, five times"
    assert verdict.evidence.endswith("in the first ones. All figures are of the present stage.")
    fallen = run(train__success=lambda i: rises_then(i, 0.6 if i < 45 else 0.2), curriculum__stage=staged)
    (verdict,) = judge(fallen)
    assert verdict.rule.name == "success_fell"
    assert verdict.began > 45
    assert "from 60% to" in verdict.evidence or "from 61% to" in verdict.evidence, "not from the 80% of the first stage"


def test_groups_of_two_stages_are_not_mixed() -> None:
    rows = run(
        signal__dead_groups=lambda i: 0.8, signal__dead_groups_solved=lambda i: 0.8 if i < 30 else 0.0,
        signal__dead_groups_failed=lambda i: 0.0 if i < 30 else 0.8, signal__dead_groups_equal=lambda i: 0.0,
        train__success=lambda i: 0.84 if i < 30 else 0.1,
    )  # fmt: skip
    assert Series(rows).until(31).recent("signal/dead_groups_solved") == pytest.approx(0.64)
    for i, row in enumerate(rows):
        row[STAGE] = staged(i)
    assert Series(rows).until(31).recent("signal/dead_groups_solved") == 0.0
    (verdict,) = judge(rows)
    assert (verdict.rule.name, verdict.began, verdict.called) == ("too_hard", 31, 35)


def test_the_stage_of_a_series() -> None:
    """A step tells the stage that it leaves behind; the step that brings a stage on was played in the one before."""
    values = [0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    rows: list[dict[str, float]] = [{"step": i + 1, "x": float(i), STAGE: stage} for i, stage in enumerate(values)]
    begin = [int(Series(rows[:count]).measured("x")[0]) for count in range(1, 8)]
    assert begin == [0, 0, 0, 3, 3, 3, 6]
    series = Series(rows)
    grown = Series(())
    for count, row in enumerate(rows, start=1):
        grown.append(row)
        assert grown.measured("x").tolist() == series.until(count).measured("x").tolist()
    third = series.until(6)
    assert third.values("x").tolist() == [0, 1, 2, 3, 4, 5], "nothing is lost"
    assert (third.start("x"), third.best("x", 2), third.recent("x")) == (4.0, 4.5, 4.0)
    assert third.best_rows("x", 2).tolist() == [4, 5]
    assert third.recent_rows("x").tolist() == [3, 4, 5]
    assert np.isnan(third.fall("x"))
    # The first step is played in stage 0, wherever it leads.
    assert Series([{"step": 1, "x": 7.0, STAGE: 1.0}, {"step": 2, "x": 8.0, STAGE: 1.0}]).measured("x").tolist() == [8]
    # Steps that do not tell their stage are of the one before.
    gaps: list[dict[str, float]] = [row if i != 3 else {"step": 4, "x": 3.0} for i, row in enumerate(rows)]
    assert Series(gaps[:5]).measured("x").tolist() == [3, 4]


@pytest.mark.parametrize("figure", [ADAPTIVE, f"{ADAPTIVE}/1"])
def test_a_curriculum_that_chooses_by_success_keeps_it_where_it_is(figure: str) -> None:
    noise = scatter(2)
    half = {"train__success": lambda i: 0.5 + noise(i), "train__reward": lambda i: 0.5 + noise(i)}
    assert names(run(**half)) == {"no_progress"}
    kept = run(**half)
    for row in kept:
        row[figure] = 1.0
    assert names(kept) == set()
    found = unheard(Series(kept))
    assert [rule.name for rule in found.steered] == ["no_progress", "success_fell"]
    assert not {"no_progress", "success_fell"} & {rule.name for rule in [*found.unmeasured, *found.early]}
    assert unheard(Series(run(**half))).steered == []
    chosen = run(train__success=lambda i: (0.9 if i < 20 else 0.5) + noise(i))
    assert names(chosen) == {"success_fell"}
    for row in chosen:
        row[figure] = 1.0
    assert names(chosen) == set()


def test_other_rules_go_on_below_such_a_curriculum() -> None:
    rows = run(behaviour__thought_tokens=lambda i: 20.0 if i < 30 else 60.0, curriculum__adaptive=lambda i: 1.0)
    assert names(rows) == {"length_drift"}
