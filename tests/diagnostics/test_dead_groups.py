"""Whatever mixture of causes makes groups dead, one rule says so, and only one."""

from __future__ import annotations

import math
from itertools import product

import pytest

from rehearsal.diagnostics import Series, Thresholds, judge
from rehearsal.diagnostics.dead_groups import DeadGroups, cause_of, dead_groups
from rehearsal.diagnostics.rules import RULES

CAUSES = ("too_easy", "too_hard", "no_signal", "all_or_nothing")
LIMITS = Thresholds()


def rows_of(solved: float, failed: float, equal: float, steps: int = 30) -> list[dict[str, float]]:
    """A run of nothing else; half of the episodes of the other groups succeed."""
    dead = solved + failed + equal
    return [
        {
            "step": step, "signal/dead_groups": dead, "signal/dead_groups_solved": solved,
            "signal/dead_groups_failed": failed, "signal/dead_groups_equal": equal,
            "train/success": solved + equal / 2 + (1 - dead) / 2, "train/reward": 0.5,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def speaking(solved: float, failed: float, equal: float) -> list[str]:
    series = Series(rows_of(solved, failed, equal))
    return [rule.name for rule in RULES if rule.condition(series, LIMITS) is not None]


SIMPLEX = [(i / 20, j / 20, k / 20) for i, j, k in product(range(21), repeat=3) if i + j + k == 20]


@pytest.mark.parametrize("dead", [1.0, 0.95, 0.9, 0.85, 0.8, 0.76])
def test_one_rule_speaks_everywhere(dead: float) -> None:
    for mixture in SIMPLEX:
        solved, failed, equal = (dead * share for share in mixture)
        told = speaking(solved, failed, equal)
        assert len(told) <= 1, (mixture, told)
        # With alive groups among those that are not solved, a run has learned its tasks, or gets nowhere with them.
        learned = solved > dead / 2 - 1e-9 and failed + equal < LIMITS.dead * (1 - solved)
        if dead == 1.0 or not learned:
            assert set(told) <= set(CAUSES), mixture
            assert told, mixture
        elif told and told[0] not in CAUSES:
            assert told == ["no_progress"], mixture
        elif not told:
            assert rows_of(solved, failed, equal)[0]["train/success"] >= LIMITS.success_done, mixture
        if solved >= LIMITS.solved:
            assert told == ["too_easy"]
        elif failed > 0.501 * dead:
            assert told == ["too_hard"]
        elif equal > 0.501 * dead:
            assert told == ["no_signal"]


@pytest.mark.parametrize(
    ("solved", "failed", "equal", "name"),
    [
        (0.80, 0.15, 0.05, "no_signal"),
        (0.55, 0.00, 0.45, "no_signal"),
        (0.45, 0.10, 0.45, "no_signal"),
        (0.84, 0.00, 0.16, "no_signal"),
        (0.10, 0.45, 0.45, "no_signal"),
        (0.00, 0.50, 0.50, "no_signal"),
        (0.00, 0.00, 1.00, "no_signal"),
        (0.45, 0.45, 0.10, "all_or_nothing"),
        (0.75, 0.25, 0.00, "all_or_nothing"),
        (0.30, 0.70, 0.00, "too_hard"),
        (0.86, 0.14, 0.00, "too_easy"),
    ],
)
def test_which_rule_speaks_where_every_group_is_dead(solved: float, failed: float, equal: float, name: str) -> None:
    assert [verdict.rule.name for verdict in judge(rows_of(solved, failed, equal))] == [name]


def test_a_run_that_has_learned_most_of_its_tasks_is_not_called() -> None:
    limits = {"dead": LIMITS.dead, "solved": LIMITS.solved, "done": LIMITS.success_done}
    assert cause_of(DeadGroups(0.82, 0.72, 0.10, 0.0, 0.80), **limits) is None
    assert cause_of(DeadGroups(0.88, 0.82, 0.06, 0.0, 0.88), **limits) is None
    assert cause_of(DeadGroups(0.96, 0.82, 0.14, 0.0, 0.84), **limits) == "no_signal", "what is not solved is dead"
    assert cause_of(DeadGroups(0.74, 0.0, 0.74, 0.0, 0.1), **limits) is None
    assert cause_of(DeadGroups(math.nan, 0.0, 0.0, 0.0, 0.1), **limits) is None


def test_the_mixture_is_told() -> None:
    (verdict,) = judge(rows_of(0.80, 0.15, 0.05))
    assert verdict.evidence == (
        "In 100% of the groups all episodes have the same reward: in 80% because all succeed, in 15% because none "
        "does, in 5% whether they succeed or not."
    )
    (verdict,) = judge(rows_of(0.55, 0.0, 0.45))
    assert "none does" not in verdict.evidence


def test_causes_that_nobody_knows() -> None:
    bare: list[dict[str, float]] = [{"step": step, "signal/dead_groups": 1.0} for step in range(1, 6)]
    assert dead_groups(Series(bare)).mixture == ""
    (verdict,) = judge(bare)
    assert (verdict.rule.name, verdict.evidence) == (
        "no_signal", "In 100% of the groups all episodes have the same reward."
    )  # fmt: skip


def test_nothing_false_is_said_of_algorithms_that_do_without_groups() -> None:
    (rule,) = (rule for rule in RULES if rule.name == "no_signal")
    assert "the policy learns nothing" not in rule.sentence


@pytest.mark.parametrize(("solved", "failed", "name"), [(0.58, 0.17, None), (0.50, 0.26, "all_or_nothing")])
def test_tasks_beyond_reach_are_a_complaint_where_they_are_most_of_what_is_left(
    solved: float, failed: float, name: str | None
) -> None:
    found = DeadGroups(solved + failed, solved, failed, 0.0, 0.75)
    assert cause_of(found, dead=LIMITS.dead, solved=LIMITS.solved, done=LIMITS.success_done) == name
