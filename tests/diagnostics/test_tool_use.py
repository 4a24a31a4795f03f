"""An agent that gave up a tool is told from one that needs it no more, and from chance."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rehearsal.diagnostics import Series, judge
from rehearsal.diagnostics.tool_use import AbandonedTool, abandoned_tools, tool_names

Rows = list[dict[str, float]]


def rows(
    used: Callable[[int], float], success: Callable[[int], float] | None = None, steps: int = 40, episodes: float = 64,
    tool: str = "calculator", **more: float,
) -> Rows:  # fmt: skip
    made = []
    for i in range(steps):
        row = {
            "step": i + 1,
            "train/episodes": episodes,
            "train/tools/calls": used(i),
            f"train/tools/{tool}/used": used(i),
        }
        row |= {name.replace("__", "/"): value for name, value in more.items()}
        made.append(row | ({} if success is None else {"train/success": success(i)}))
    return made


def found(made: Rows) -> list[AbandonedTool]:
    return abandoned_tools(Series(made), share=0.2, certain=3.0, done=0.85)


def gone(i: int) -> float:
    return 0.6 if i < 15 else 0.0


def test_a_tool_that_was_given_up() -> None:
    made = rows(gone, lambda i: 0.3 if i < 15 else 0.2, train__tools__calculator__failures=0.75)
    (one,) = found(made)
    assert (one.name, one.most, one.now, one.failures) == ("calculator", pytest.approx(0.6), 0.0, 0.75)
    assert (one.scale, one.before, one.after) == ("success", pytest.approx(0.3), pytest.approx(0.2))
    (verdict,) = [verdict for verdict in judge(made) if verdict.rule.name == "tool_abandoned"]
    assert verdict.began == 20, "the first step whose mean of five lies below a fifth"
    assert "calculator; it was 60%, when 75% of its calls failed." in verdict.evidence
    assert "Since then success went from 30% to" in verdict.evidence


def test_success_that_stays_has_not_risen() -> None:
    """Means of equal numbers may differ in their last digit, which is infinitely many errors of nothing."""
    for success in (0.1, 0.2, 0.3, 0.7):
        assert len(found(rows(gone, lambda i, success=success: success))) == 1  # type: ignore[misc]


def test_the_reward_stands_in_where_success_is_not_known() -> None:
    (one,) = found(rows(gone, train__reward=0.5))
    assert (one.scale, one.before, one.after) == ("reward", 0.5, 0.5)
    better = rows(gone)
    for i, row in enumerate(better):
        row["train/reward"] = 0.1 if i < 15 else 0.5
    assert found(better) == []
    (bare,) = found(rows(gone))
    assert bare.scale == ""


@pytest.mark.parametrize(
    "made",
    [
        rows(gone, lambda i: 0.3 if i < 15 else 0.6),  # it does better without
        rows(gone, lambda i: 0.95),  # it has nothing to gain
        rows(lambda i: 0.6 if i < 15 else 0.2, lambda i: 0.3),  # it calls less, and still calls
        rows(lambda i: 0.0, lambda i: 0.3),  # it never called
        rows(lambda i: 0.6, lambda i: 0.3),
        rows(gone, lambda i: 0.3, steps=4),  # too early to tell
        rows(lambda i: 1 / 64 if i == 2 else 0.0, lambda i: 0.3),  # one stray call is no habit
    ],
    ids=["better", "done", "less", "never", "always", "early", "stray"],
)
def test_what_is_not_given_up(made: Rows) -> None:
    assert found(made) == []
    assert "tool_abandoned" not in {verdict.rule.name for verdict in judge(made)}


def test_chance_does_not_give_up_a_tool() -> None:
    """Small batches in which one episode in twenty calls."""
    rng = random.Random(0)
    called = 0
    for _ in range(30):
        shares = [sum(rng.random() < 0.05 for _ in range(16)) / 16 for _ in range(60)]
        verdicts = judge(rows(lambda i, shares=shares: shares[i], lambda i: 0.3, steps=60, episodes=16))  # type: ignore[misc]
        called += any(verdict.rule.name == "tool_abandoned" for verdict in verdicts)
    assert called <= 1


def test_only_the_tools_that_an_agent_still_has_are_judged() -> None:
    made = rows(gone, lambda i: 0.3)
    for row in made[30:]:
        del row["train/tools/calculator/used"]
        row["train/tools/search/used"] = 0.4
    assert found(made) == []
    assert [one.name for one in found(made[:30])] == ["calculator"]


def test_calls_that_begin_again_end_the_verdict() -> None:
    made = rows(lambda i: 0.6 if i < 15 or i >= 40 else 0.0, lambda i: 0.3, steps=60)
    (verdict,) = [verdict for verdict in judge(made) if verdict.rule.name == "tool_abandoned"]
    assert verdict.ended is not None
    assert 40 <= verdict.ended <= 45


def test_names_of_tools() -> None:
    names = ["train/tools/calls", "train/tools/a.b-c/used", "train/tools/calls/used", "tools/x/used", "train/used"]
    assert tool_names(names) == ["a.b-c", "calls"]


def test_the_best_rows_of_a_series() -> None:
    series = Series([{"step": 1, "x": 1.0}, {"step": 2}, {"step": 3, "x": 3.0}, {"step": 4, "x": 3.0, "y": 2.0}])
    assert series.best_rows("x", 2).tolist() == [2, 3]
    assert series.best("x", 2) == 3.0
    assert series.best_rows("x", 4).tolist() == []
    assert series.recent_rows("x", 2).tolist() == [2, 3]
    assert series.fresh_names() == ["step", "x", "y"]
    assert Series([]).fresh_names() == []
