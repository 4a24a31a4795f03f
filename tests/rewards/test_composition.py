"""Combinations of rewards, and what each does to advantages that are normalised within groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.algorithms.advantages import dr_grpo, grpo, whiten
from rehearsal.algorithms.shaping import OverlongPenalty
from rehearsal.errors import RewardError
from rehearsal.rewards.composition import Composite, Gate, PartialCredit, WeightedSum, verify_combined
from rehearsal.rewards.groups import normalised_apart
from rehearsal.rewards.lengths import cosine_length_reward, kimi_length_reward, overlong_penalty
from rehearsal.rewards.mathematics import LastNumber
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.repetition import repetition_penalty
from rehearsal.rewards.structure import Pattern
from rehearsal.rewards.turns import TurnCredits
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError

NAN = math.nan
G = 8
LONE = (G - 1) / math.sqrt(G)
"""The advantage of one episode above G - 1 equal ones, with the unbiased deviation."""


def scores(solved: bool, form: bool) -> dict[str, Score]:
    return {"math": Score(float(solved), solved), "format": Score(float(form), form)}


def rewards(combine: Any, *episodes: tuple[bool, bool]) -> list[list[float]]:
    return [[combine(scores(*episode)).value for episode in episodes]]


NONE, FORM, SOLVED, BOTH = (False, False), (False, True), (True, False), (True, True)
SUM = WeightedSum({"math": 1.0, "format": 0.1}, success=("math",))
GATE = Gate("math", {"format": 0.1})


# What the module says


def test_a_lone_format_pass_in_a_group_of_zeros_gets_the_advantage_of_a_solution() -> None:
    only_form = grpo(rewards(SUM, FORM, *[NONE] * (G - 1)), eps=0.0)[0]
    one_solved = grpo(rewards(SUM, SOLVED, *[NONE] * (G - 1)), eps=0.0)[0]
    assert only_form[0] == pytest.approx(LONE) == pytest.approx(one_solved[0])
    # Where somebody solves it, it is a tenth as good; and without the division it always is.
    mixed = grpo(rewards(SUM, SOLVED, FORM, *[NONE] * (G - 2)), eps=0.0)[0]
    assert (mixed[1] - mixed[2]) / (mixed[0] - mixed[2]) == pytest.approx(0.1)
    assert dr_grpo(rewards(SUM, FORM, *[NONE] * (G - 1)))[0, 0] == pytest.approx(0.1 * (G - 1) / G)


def test_a_gate_gives_form_no_chance_to_be_alone() -> None:
    assert (grpo(rewards(GATE, FORM, *[NONE] * (G - 1))) == 0).all()
    among_solutions = grpo(rewards(GATE, BOTH, *[SOLVED] * (G - 1)), eps=0.0)[0]
    assert among_solutions[0] == pytest.approx(LONE)
    mixed = grpo(rewards(GATE, BOTH, FORM, NONE, SOLVED))[0]
    assert mixed[0] > mixed[3] > mixed[1] == mixed[2]


def test_partial_credit_alone_counts_like_a_solution() -> None:
    credit = PartialCredit("math", {"format": 0.1})
    assert grpo(rewards(credit, FORM, *[NONE] * (G - 1)), eps=0.0)[0, 0] == pytest.approx(LONE)


def test_adding_the_same_to_all_changes_nothing() -> None:
    assert (grpo(rewards(SUM, *[FORM] * G)) == 0).all()


# The combinations by hand


@pytest.mark.parametrize(
    ("combine", "values", "passed"),
    [
        (SUM, [0.0, 0.1, 1.0, 1.1], [False, False, True, True]),
        (WeightedSum({"math": 1.0, "format": 0.1}), [0.0, 0.1, 1.0, 1.1], [False, False, False, True]),
        (WeightedSum({"math": 1.0, "format": -0.5}), [0.0, -0.5, 1.0, 0.5], [False, False, True, True]),
        (GATE, [0.0, 0.0, 1.0, 1.1], [False, False, True, True]),
        (Gate("math", needs=("format",)), [0.0, 0.0, 0.0, 1.0], [False, False, False, True]),
        (PartialCredit("math", {"format": 0.1}), [0.0, 0.1, 1.0, 1.0], [False, False, True, True]),
    ],
)
def test_combinations_by_hand(combine: Any, values: list[float], passed: list[bool]) -> None:
    found = [combine(scores(*episode)) for episode in (NONE, FORM, SOLVED, BOTH)]
    assert [score.value for score in found] == pytest.approx(values)
    assert [score.passed for score in found] == passed
    assert found[3].parts == {"math": 1.0, "format": 1.0}


def test_a_share_of_the_tests_is_partial_credit() -> None:
    credit = PartialCredit("code", share=0.5)
    assert credit({"code": Score(0.8, False, {"tests": 0.8}, "4 of 5")}).value == pytest.approx(0.4)
    assert credit({"code": Score(0.8, True)}).value == 1.0
    whole = credit({"code": Score(0.8, False, {"tests": 0.8}, "4 of 5")})
    assert (whole.parts, whole.evidence) == ({"code": 0.8, "code/tests": 0.8}, "code: 4 of 5")


def test_combinations_refuse_what_does_not_fit() -> None:
    with pytest.raises(RewardError, match="takes scores of format, math, not of math"):
        SUM({"math": Score(1.0, True)})
    with pytest.raises(RewardError, match="has no part 'form'; there are: math"):
        WeightedSum({"math": 1.0}, success=("form",))
    # What all of nothing passed has not passed: a peer's check of no results was a success.
    with pytest.raises(RewardError, match="what counts as success"):
        WeightedSum({"format": -1.0})
    for level in (1.0, -0.1, 2.0):
        with pytest.raises(RewardError, match="at least 0 and below 1"):
            PartialCredit("math", {"format": level})
    with pytest.raises(ValueError, match="must be finite"):
        WeightedSum({"math": math.inf})({"math": Score(1.0, True)})


def verifiers() -> dict[str, Any]:
    return {"math": LastNumber(), "format": Pattern("<think>.*</think>.*", where="completion")}


def test_several_verifiers_as_one() -> None:
    both = Composite(verifiers(), GATE)
    score = both.verify("<think>1</think>18", Task("x", "18"))
    assert (score.value, score.passed) == (1.1, True)
    assert both.verify("18", Task("x", "18")).value == 1.0
    with pytest.raises(VerificationError, match=r"math: .* has no number"):
        both.verify("18", Task("x", "none"))
    with pytest.raises(RewardError, match="takes format, math, but the verifiers are math"):
        Composite({"math": LastNumber()}, GATE)


def test_composites_run_where_their_verifiers_run() -> None:
    class Waiting(LastNumber):
        runs_in = "thread"

    assert Composite(verifiers(), GATE).runs_in == "process"
    assert Composite({"math": Waiting()}, Gate("math")).runs_in == "thread"
    with pytest.raises(RewardError, match="some in threads"):
        Composite({**verifiers(), "math": Waiting()}, GATE)


def test_a_pool_combines_and_a_failed_part_is_a_failure() -> None:
    texts = ["<think>1</think>18", "18", "17", "18"]
    tasks = [Task("x", "18")] * 3 + [Task("x", "none")]
    with VerifierPool(verifiers(), workers=1) as pool:
        results = verify_combined(pool, GATE, texts, tasks)
    assert [r.value for r in results[:3] if isinstance(r, Score)] == [1.1, 1.0, 0.0]
    assert isinstance(results[3], Failure) and results[3].message.startswith("math: ")
    with VerifierPool(Composite(verifiers(), GATE), workers=1) as pool:
        assert [r.value for r in pool.verify(texts, tasks)[:3] if isinstance(r, Score)] == [1.1, 1.0, 0.0]


# Parts normalised apart

SOLVED_PG = np.array([[1, 0, 0, 0, 0, 0, 0, 0.0], [1, 1, 0, 0, 1, 1, 0, 0]])
FORM_PG = np.array([[1, 1, 1, 1, 0, 0, 0, 0.0], [1, 0, 0, 0, 0, 0, 0, 0]])


def test_normalised_apart_keeps_weights_whatever_the_spread() -> None:
    parts: Mapping[str, Any] = {"math": SOLVED_PG, "format": 100 * FORM_PG}
    apart_PG = normalised_apart(parts, {"math": 1.0, "format": 0.5}, lambda x_PG: grpo(x_PG, eps=0.0))
    expected_PG = grpo(SOLVED_PG, eps=0.0) + 0.5 * grpo(FORM_PG, eps=0.0)
    np.testing.assert_allclose(apart_PG, expected_PG)
    np.testing.assert_allclose(apart_PG.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(dr_grpo(apart_PG), apart_PG, atol=1e-12)
    # Summed first, the part of the larger scale is nearly all there is.
    together_PG = grpo(SOLVED_PG + 0.5 * 100 * FORM_PG, eps=0.0)
    assert np.corrcoef(together_PG[0], FORM_PG[0])[0, 1] > 0.999
    assert np.corrcoef(apart_PG[0], FORM_PG[0])[0, 1] < 0.9
    assert np.isfinite(whiten(apart_PG.ravel())).all()


def test_combinations_that_fall_together_when_summed_are_told_apart() -> None:
    """(solved, no form) and (unsolved, form) have one sum with equal weights; one of them is rarer than the other."""
    solved, form = np.array([[1.0, 0, 0, 0, 0]]), np.array([[0.0, 1, 1, 1, 0]])
    assert grpo(solved + form)[0, 0] == grpo(solved + form)[0, 1]
    apart = normalised_apart({"s": solved, "f": form}, {"s": 1.0, "f": 1.0}, grpo)
    assert apart[0, 0] > apart[0, 1]


def test_a_lone_format_pass_keeps_its_weight_when_normalised_apart() -> None:
    form = np.array([[1.0] + [0.0] * (G - 1)])
    apart = normalised_apart({"s": 0 * form, "f": form}, {"s": 1.0, "f": 0.25}, lambda x: grpo(x, eps=0.0))
    assert apart[0, 0] == pytest.approx(0.25 * LONE)


def test_an_episode_without_one_part_stays_out_of_the_baselines_of_all() -> None:
    solved = np.array([[1.0, 0.0, NAN, 1.0]])
    form = np.array([[0.0, 1.0, 50.0, 0.0]])
    apart = normalised_apart({"s": solved, "f": form}, {"s": 1.0, "f": 1.0}, grpo)
    without = normalised_apart(
        {"s": solved[:, [0, 1, 3]], "f": form[:, [0, 1, 3]]}, {"s": 1.0, "f": 1.0}, grpo
    )  # fmt: skip
    assert math.isnan(apart[0, 2])
    np.testing.assert_allclose(apart[:, [0, 1, 3]], without)


def test_normalised_apart_refuses_what_does_not_fit() -> None:
    with pytest.raises(RewardError, match="need the same names, not a and b"):
        normalised_apart({"a": [[1.0]]}, {"b": 1.0}, grpo)
    with pytest.raises(RewardError, match="different shapes"):
        normalised_apart({"a": [[1.0]], "b": [[1.0, 2.0]]}, {"a": 1.0, "b": 1.0}, grpo)


# Lengths


def test_overlong_by_hand_and_as_the_algorithms_use_it() -> None:
    lengths = [0, 80, 90, 100, 150]
    assert overlong_penalty(lengths, 100, 20).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert OverlongPenalty(100, 20)(lengths).tolist() == overlong_penalty(lengths, 100, 20).tolist()
    with pytest.raises(RewardError, match="cache_tokens between 1 and max_tokens"):
        overlong_penalty(lengths, 100, 0)
    # One answer that is a single token too long, among equals.
    slight = overlong_penalty([[81] + [10] * (G - 1)], 100, 20)
    assert grpo(slight, eps=0.0)[0, 0] == pytest.approx(-LONE)
    assert dr_grpo(slight)[0, 0] == pytest.approx(-0.05 * (G - 1) / G)


def test_kimi_by_hand() -> None:
    lengths, passed = [[100, 200, 300, 100, 300]], [[True, True, True, False, False]]
    assert kimi_length_reward(lengths, passed).tolist() == [[0.5, 0.0, -0.5, 0.0, -0.5]]
    assert (kimi_length_reward([[7, 7, 7]], [[True, False, True]]) == 0).all()
    found = kimi_length_reward([[100, NAN, 300], [NAN, NAN, NAN]], [[True, True, True]] * 2)
    np.testing.assert_array_equal(found, [[0.5, NAN, -0.5], [NAN] * 3])


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), min_size=1, max_size=9))
@settings(deadline=None)
def test_what_holds_for_kimis_length_reward(answers: list[tuple[int, bool]]) -> None:
    lengths, passed = np.array([[n for n, _ in answers]]), np.array([[p for _, p in answers]])
    found = kimi_length_reward(lengths, passed)
    assert ((found >= -0.5) & (found <= 0.5)).all()
    assert (found[~passed] <= 0).all(), "a wrong answer gains nothing by being short"
    right = np.argsort(lengths[passed])
    assert (np.diff(found[passed][right]) <= 1e-12).all()


def test_the_cosine_reward_by_hand() -> None:
    found = cosine_length_reward([0, 50, 100, 500, 0, 50, 100], [True] * 4 + [False] * 3, 100)
    np.testing.assert_allclose(found, [1.0, 0.75, 0.5, 0.5, -1.0, -0.75, -0.5], atol=1e-12)
    paper = cosine_length_reward([0, 100, 0, 99.999], [True, True, False, False], 100, right=(2, 1), wrong=(-10, 0),
                                 exceeded=-10)  # fmt: skip
    np.testing.assert_allclose(paper, [2, -10, -10, 0], atol=1e-6)
    with pytest.raises(RewardError, match="1 or more"):
        cosine_length_reward([1], [True], 0)
    # In a group where all are wrong, the longest is taught.
    assert int(np.argmax(grpo(cosine_length_reward([[10, 90, 50]], [[False] * 3], 100)))) == 1


def test_repetition_by_hand() -> None:
    assert repetition_penalty("a b c d") == 0.0
    assert repetition_penalty("a b c a b c") == pytest.approx(-0.25)
    assert repetition_penalty("A b c a B c", most=2.0) == pytest.approx(-0.5)
    assert repetition_penalty([5] * 102) == pytest.approx(-0.99)
    assert repetition_penalty([5, 6], n=3) == repetition_penalty("") == 0.0
    assert repetition_penalty([1, 1, 2], n=1) == pytest.approx(-1 / 3)
    for wrong in ({"n": 0}, {"most": -1.0}):
        with pytest.raises(RewardError, match="n of at least 1"):
            repetition_penalty("a", **wrong)  # type: ignore[arg-type]


# Turns


def test_credits_of_turns_by_hand() -> None:
    violations = [{"rude"}, set(), {"rude", "wrong tool"}, set()]
    obligations = [set(), {"greet", "ask"}, {"greet"}, {"greet", "close"}]
    assert TurnCredits()(violations, obligations, True).tolist() == [-0.5, 1.0, -0.5, 0.5]
    assert TurnCredits()(violations, obligations, False).tolist() == [-0.5, 0.0, -0.5, 0.0]
    assert TurnCredits(gated=False)(violations, obligations, False).tolist() == [-0.5, 1.0, -0.5, 0.5]
    assert TurnCredits(0.1, 2.0)(violations, obligations, True).tolist() == [-0.1, 4.0, -0.1, 2.0]
    assert TurnCredits()([], [], True).shape == (0,)
    with pytest.raises(RewardError, match="amounts of at least 0"):
        TurnCredits(penalty=-1)
    with pytest.raises(RewardError, match="2 turns and obligations of 1"):
        TurnCredits()([set(), set()], [set()], True)


def test_doing_a_duty_again_earns_nothing() -> None:
    assert TurnCredits()([set()] * 50, [{"greet"}] * 50, True).sum() == 0.5


def test_with_penalties_alone_doing_nothing_is_best() -> None:
    """Why the outcome stays primary: among failures, the agent that never acts has the best advantage."""
    acts = TurnCredits(credit=0.0)([{"rude"}, set()], [{"ask"}, set()], False).sum()
    idles = TurnCredits(credit=0.0)([set(), set()], [set(), set()], False).sum()
    assert grpo([[acts, idles, idles, idles]])[0, 0] < 0 < grpo([[acts, idles, idles, idles]])[0, 1]
