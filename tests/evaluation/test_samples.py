"""Several samples of a task: estimates against enumeration, and comparisons that do not cry wolf."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.cli import main
from rehearsal.errors import RecipeError
from rehearsal.evaluation.run import evaluate_policy
from rehearsal.evaluation.samples import (
    best_of_n,
    compare,
    majority,
    pass_at_k,
    pass_hat_k,
    sample_figures,
    success_by_task,
)
from rehearsal.trajectory import Group, StopReason, Trajectory, Turn


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_rates_are_those_of_all_draws(outcomes: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(outcomes)))
    draws = list(itertools.combinations(outcomes, k))
    n, c = len(outcomes), sum(outcomes)
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_hat_k(n, c, k) == pytest.approx(sum(map(all, draws)) / len(draws))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, allow_nan=False)), min_size=1, max_size=7), st.data()
)  # fmt: skip
def test_best_of_n_is_that_of_all_draws(samples: list[tuple[int, float]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(samples)))

    def pick(draw: tuple[tuple[int, float], ...]) -> float:
        best = max(proxy for proxy, _ in draw)
        tied = [value for proxy, value in draw if proxy == best]
        return sum(tied) / len(tied)

    draws = list(itertools.combinations(samples, n))
    proxies, values = zip(*samples, strict=True)
    # Where scores tie, the mean over ties of each draw and the shared weight of all tied samples agree by symmetry.
    assert best_of_n(proxies, values, n) == pytest.approx(sum(map(pick, draws)) / len(draws), abs=1e-9)


def test_large_numbers_do_not_overflow() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert 0 < pass_hat_k(3000, 2000, 10) < 1


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1), (3, -1, 1)])
def test_numbers_that_do_not_go_together(n: int, c: int, k: int) -> None:
    for measure in (pass_at_k, pass_hat_k):
        with pytest.raises(ValueError, match="k must be 1"):
            measure(n, c, k)
    with pytest.raises(ValueError, match="2 scores for 1"):
        best_of_n([1, 2], [1], 1)


def test_majorities() -> None:
    assert majority(["b", "A", " a ", "B", "a"]) == "A", "in its first spelling"
    assert majority(["7", "1,000", "7", "1000", "1000.0"]) == "1,000", "numbers are compared by value"
    assert majority(["b", "a"]) == "b", "the first of equally frequent ones"
    assert majority(["", " "]) is majority([]) is None


def episode(success: bool | None, answer: str = "1", failed: bool = False) -> Trajectory:
    made = Trajectory("made-up", 0, "test", success=success)
    made.turns = [Turn("", executed=[answer], rewards=[0.0])]
    made.stop_reason = StopReason.ERROR if failed else StopReason.TERMINATED
    if failed:
        made.error = "It broke."
    return made


def test_figures_of_several_samples() -> None:
    groups = [
        Group([episode(True, "7"), episode(True, "7"), episode(False, "8"), episode(False, "9")]),
        Group([episode(False, "1"), episode(False, "1"), episode(True, "2"), episode(True, "9", failed=True)]),
        Group([episode(None), episode(True, failed=True)]),
    ]
    figures = sample_figures(groups)
    assert figures["pass@1"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert figures["pass@2"] == pytest.approx((pass_at_k(4, 2, 2) + pass_at_k(3, 1, 2)) / 2)
    assert figures["pass@4"] == 1.0, "of the one task that has four"
    assert figures["pass^2"] == pytest.approx((1 / 6 + 0) / 2)
    assert figures["majority@4"] == 0.5
    assert figures["pass@2/low"] <= figures["pass@2"] <= figures["pass@2/high"]
    assert success_by_task(groups)[:2] == [0.5, pytest.approx(1 / 3)]
    assert math.isnan(success_by_task(groups)[2])
    assert sample_figures([Group([episode(None)])]) == {}
    three = sample_figures([Group([episode(True)] * 3)])
    assert {"pass@1", "pass@2", "pass@3"} <= set(three) and "pass@4" not in three
    # Of several answers none is the vote.
    talker = episode(True)
    talker.turns = talker.turns * 2
    assert not any(name.startswith("majority") for name in sample_figures([Group([talker, talker])]))


def test_an_episode_without_an_answer_has_no_vote() -> None:
    silent = episode(False)
    silent.turns = [Turn("", response="I do not know.")]
    outvoted = Group([episode(True, "7"), episode(True, "7"), episode(False, "8"), silent, silent])
    assert sample_figures([outvoted])["majority@5"] == 1.0, "the silent ones are no majority"
    figures = sample_figures([outvoted, Group([silent] * 5)])
    assert figures["majority@5"] == 0.5, "a task without votes is not solved"
    assert figures["majority@5/low"] == 0.0 and figures["majority@5/high"] == 1.0


def test_a_difference_is_found_by_task() -> None:
    rng = random.Random(0)
    hard = [rng.random() for _ in range(200)]
    better = [min(1.0, p + 0.1) for p in hard]
    found = compare(better, hard)
    assert found.difference == pytest.approx(float(np.mean(better) - np.mean(hard)))
    assert 0 < found.low < found.high < 0.2
    assert found.p_value < 0.001
    assert (found.tasks, found.worse) == (200, 0)
    assert compare(hard, hard).p_value == 1.0
    with_gaps = compare([1.0, math.nan, 1.0], [0.0, 1.0, math.nan])
    assert (with_gaps.tasks, with_gaps.better) == (1, 1)


def test_two_alike_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(0)
    wolves = sum(compare(*rng.integers(0, 2, (2, 60)).astype(float)).p_value < 0.05 for _ in range(200))
    assert wolves <= 20


def test_what_cannot_be_compared() -> None:
    with pytest.raises(RecipeError, match="2 and 1 tasks"):
        compare([1.0, 0.0], [1.0])
    with pytest.raises(RecipeError, match="no task in common"):
        compare([math.nan], [1.0])


FEW = {"environment.params.size": 3, "agent.thinking": False, "agent.max_tokens_per_turn": 12, "agent.max_context": 260}


def test_a_policy_against_itself(taught_folder: Path) -> None:
    figures = evaluate_policy(taught_folder, recipe="frozenlake", overrides=FEW, episodes=6, samples=4,
                              against=taught_folder)  # fmt: skip
    assert (figures["against/difference"], figures["against/p_value"]) == (0.0, 1.0)
    assert figures["against/success"] == figures["success"] == pytest.approx(figures["pass@1"])
    assert figures["episodes"] == 24
    assert figures["success_low"] == figures["pass@1/low"]
    for k in (1, 2):
        assert figures[f"pass@{k}"] <= figures[f"pass@{2 * k}"]
        assert figures[f"pass^{k}"] >= figures[f"pass^{2 * k}"]


def test_bad_requests(taught_folder: Path) -> None:
    with pytest.raises(RecipeError, match="samples must be 1 or more"):
        evaluate_policy(taught_folder, samples=0)
    with pytest.raises(RecipeError, match="behind a server"):
        evaluate_policy("model", url="http://localhost:1/v1", against="base")


def test_on_the_command_line(taught_folder: Path, capsys: Any) -> None:
    few = [part for name, value in FEW.items() for part in (f"--{name}", str(value).lower())]
    command = ["eval", str(taught_folder), "--recipe", "frozenlake", "--episodes", "4", "--samples", "2", "--against"]
    assert main([*command, str(taught_folder), *few]) == 0
    said = capsys.readouterr().out
    assert "pass@2" in said and "difference" in said and "+0.0 points" in said
    assert "/low" not in said
