"""Answers that run too long."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal.algorithms import OverlongPenalty, was_cut_off
from rehearsal.errors import RecipeError
from rehearsal.trajectory import SampleStop, StopReason, Trajectory, Turn


def test_overlong_penalty_by_hand():
    penalty = OverlongPenalty(max_tokens=20, cache_tokens=8)
    np.testing.assert_allclose(penalty([0, 12, 13, 16, 20, 21, 1000]), [0, 0, -0.125, -0.5, -1, -1, -1])


@pytest.mark.parametrize(("max_tokens", "cache_tokens"), [(10, 0), (10, 11), (0, 0), (-5, 2)])
def test_overlong_penalty_needs_room(max_tokens, cache_tokens):
    with pytest.raises(RecipeError):
        OverlongPenalty(max_tokens, cache_tokens)


@pytest.mark.parametrize(
    ("stop_reason", "last", "expected"),
    [
        (StopReason.TERMINATED, SampleStop.END, False),
        (StopReason.TURN_LIMIT, SampleStop.END, False),
        (StopReason.CONTEXT_LIMIT, SampleStop.END, True),
        (StopReason.TERMINATED, SampleStop.LENGTH, True),
        (StopReason.TURN_LIMIT, SampleStop.CONTEXT, True),
    ],
)
def test_was_cut_off_looks_at_the_last_turn(stop_reason, last, expected):
    turns = [Turn("observation", stop=SampleStop.LENGTH), Turn("observation", stop=last)]
    assert was_cut_off(Trajectory("toy", 0, turns=turns, stop_reason=stop_reason)) is expected
    assert was_cut_off(Trajectory("toy", 0, stop_reason=StopReason.CONTEXT_LIMIT))
