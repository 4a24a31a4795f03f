"""One sentence about the run: did held-out play get better, and by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["better", "worse", "unclear", "single", "unmeasured"]

HELD_OUT = ("test", "validation")
"""Splits that training never sees, the better judge first."""


@dataclass(frozen=True)
class Score:
    """A measured value with its 95% interval, where the evaluation gave one."""

    step: int
    value: float
    low: float | None
    high: float | None
    episodes: int | None


@dataclass(frozen=True)
class Verdict:
    """What the held-out evaluations say.

    Attributes:
        outcome: "better" or "worse" when the 95% interval of the difference leaves out zero, "unclear" when it holds
            zero or cannot be had, "single" with one evaluation, "unmeasured" with none.
        quantity: "success" or "reward".
        split: the split that is judged ("" if none was played).
        start: the first evaluation.
        end: the last one: not the best one, which would be lucky by choice.
        difference: end minus start.
        difference_low: lower end of its 95% interval, or None.
        difference_high: upper end.
        sentence: all of it in words.
    """

    outcome: Outcome
    quantity: Literal["success", "reward"]
    split: str
    start: Score | None
    end: Score | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    sentence: str


def judge(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> Verdict:
    """Compare the first with the last evaluation of the held-out split that spans the most of the run.

    The interval of the difference is Newcombe's (1998, Statistics in Medicine 17, method 10), which squares and adds
    the distances of each value to the ends of its own interval. It treats the two evaluations as independent; they
    play the same tasks, so it errs on the side of caution.

    Args:
        evaluations: by split, the rows of ``evaluations.jsonl`` in the order of their steps.
    """
    split = judged_split(evaluations)
    if split is None:
        return Verdict("unmeasured", "success", "", None, None, None, None, None, _UNMEASURED)
    rows = evaluations[split]
    knows_success = any(number(row.get("success")) is not None for row in rows)
    quantity: Literal["success", "reward"] = "success" if knows_success else "reward"
    scores = [score for row in rows if (score := _score(row, quantity)) is not None]
    if not scores:
        sentence = "The held-out evaluations hold no score, so this run cannot say whether play got better."
        return Verdict("unmeasured", quantity, split, None, None, None, None, None, sentence)
    start, end = scores[0], scores[-1]
    if len(scores) == 1:
        sentence = "There is one held-out evaluation and nothing to compare it with."
        return Verdict("single", quantity, split, start, end, None, None, None, sentence)
    difference = end.value - start.value
    low, high = _difference_interval(start, end)
    if low is None or high is None:
        outcome: Outcome = "unclear"
        sentence = "The evaluations carry no intervals, so a change cannot be told apart from noise."
    elif low > 0:
        outcome, sentence = "better", f"The gain of {_amount(quantity, difference, low, high)} is more than noise."
    elif high < 0:
        outcome = "worse"
        sentence = f"Play got worse by {_amount(quantity, -difference, -high, -low)}, more than noise."
    else:
        outcome = "unclear"
        sentence = f"The change of {_amount(quantity, difference, low, high)} cannot be told apart from noise."
    return Verdict(outcome, quantity, split, start, end, difference, low, high, sentence)


_UNMEASURED = "No held-out evaluation was recorded, so this run cannot say whether play got better."


def judged_split(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The held-out split whose evaluations span the most of the run: the one that was played before and after it.

    Where several span the same, the one with the most evaluations, and "test" before "validation"; training data never.
    """
    candidates = [split for split, rows in evaluations.items() if rows and split != "train"]
    order = {split: place for place, split in enumerate(HELD_OUT)}

    def rank(split: str) -> tuple[float, int, int, str]:
        steps = [number(row.get("step")) or 0.0 for row in evaluations[split]]
        return (max(steps) - min(steps), len(steps), -order.get(split, len(order)), split)

    return max(candidates, key=rank, default=None)


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _score(row: Mapping[str, Any], quantity: str) -> Score | None:
    value = number(row.get(quantity))
    if value is None:
        return None
    episodes = number(row.get("episodes"))
    return Score(
        step=int(row["step"]),
        value=value,
        low=number(row.get(f"{quantity}_low")),
        high=number(row.get(f"{quantity}_high")),
        episodes=None if episodes is None else int(episodes),
    )


def _difference_interval(start: Score, end: Score) -> tuple[float | None, float | None]:
    if start.low is None or start.high is None or end.low is None or end.high is None:
        return None, None
    difference = end.value - start.value
    down = math.hypot(end.value - end.low, start.high - start.value)
    up = math.hypot(end.high - end.value, start.value - start.low)
    return difference - down, difference + up


def _amount(quantity: str, value: float, low: float, high: float) -> str:
    if quantity == "success":
        return f"{100 * value:.0f} points (95% interval {100 * low:.0f} to {100 * high:.0f})"
    return f"{value:.3g} (95% interval {low:.3g} to {high:.3g})"
