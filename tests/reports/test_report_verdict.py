"""The verdict compares the first with the last held-out evaluation, by intervals."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.reports.verdict import judge


def wilson(solved: int, episodes: int) -> dict[str, Any]:
    z, share = 1.959964, solved / episodes
    middle = (share + z * z / (2 * episodes)) / (1 + z * z / episodes)
    reach = z * math.sqrt(share * (1 - share) / episodes + z * z / (4 * episodes**2)) / (1 + z * z / episodes)
    low, high = min(share, middle - reach), max(share, middle + reach)
    return {"episodes": episodes, "success": share, "success_low": low, "success_high": high}


def at(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"step": 10 * place, **row} for place, row in enumerate(rows)]


def test_the_interval_of_the_difference_is_newcombes() -> None:
    # Newcombe (1998), table II, example (a): 56 of 70 against 48 of 80, method 10.
    verdict = judge({"test": at(wilson(48, 80), wilson(56, 70))})
    assert verdict.difference == pytest.approx(0.2)
    assert verdict.difference_low == pytest.approx(0.0524, abs=5e-5)
    assert verdict.difference_high == pytest.approx(0.3339, abs=5e-5)
    assert verdict.outcome == "better"


@given(st.integers(0, 50), st.integers(0, 50))
def test_the_outcome_follows_the_interval(before: int, after: int) -> None:
    verdict = judge({"test": at(wilson(before, 50), wilson(after, 50))})
    assert verdict.difference is not None
    assert verdict.difference_low is not None
    assert verdict.difference_high is not None
    assert -1 <= verdict.difference_low <= verdict.difference <= verdict.difference_high <= 1
    swapped = judge({"test": at(wilson(after, 50), wilson(before, 50))})
    mirror = {"better": "worse", "worse": "better", "unclear": "unclear"}
    assert swapped.outcome == mirror[verdict.outcome]
    if before == after:
        assert verdict.outcome == "unclear"
    if (before, after) == (0, 50):
        assert verdict.outcome == "better"


def test_the_last_evaluation_counts_and_not_the_best() -> None:
    verdict = judge({"test": at(wilson(10, 100), wilson(90, 100), wilson(12, 100))})
    assert verdict.outcome == "unclear"
    assert verdict.end is not None
    assert (verdict.end.step, verdict.end.value) == (20, 0.12)
    assert "cannot be told apart from noise" in verdict.sentence


def test_training_data_is_never_judged_and_the_longest_held_out_curve_is() -> None:
    many, few = at(wilson(1, 10), wilson(2, 10), wilson(3, 10)), at(wilson(9, 10), wilson(9, 10))
    assert judge({"train": many, "validation": few}).split == "validation"
    assert judge({"validation": many, "test": few}).split == "validation"
    assert judge({"validation": few, "test": few}).split == "test"
    assert judge({"train": many}).outcome == "unmeasured"


def test_too_little_to_compare_is_said() -> None:
    assert judge({}).outcome == "unmeasured"
    assert judge({"test": []}).outcome == "unmeasured"
    assert judge({"test": at(wilson(3, 10))}).outcome == "single"
    assert judge({"test": at({"success": None})}).outcome == "unmeasured"
    bare = judge({"test": at({"success": 0.1}, {"success": 0.9})})
    assert (bare.outcome, bare.difference) == ("unclear", pytest.approx(0.8))
    assert "no intervals" in bare.sentence


def test_a_loss_is_told_as_a_positive_amount() -> None:
    verdict = judge({"test": at(wilson(90, 100), wilson(40, 100))})
    assert verdict.sentence.startswith("Play got worse by 50 points (95% interval 38 to 60)")
