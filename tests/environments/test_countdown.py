"""Countdown: puzzles, scoring, and an expression parser that cannot be talked into anything."""

import time
import warnings
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.environments import make
from rehearsal.environments.arithmetic import MAX_LENGTH, parse_expression
from rehearsal.environments.countdown import Countdown, Puzzle
from rehearsal.errors import RecipeError


def with_puzzle(numbers, target, **params):
    env = Countdown(**params)
    env.reset(seed=0)
    env._puzzle = Puzzle(tuple(sorted(numbers)), target, "")
    return env


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("(3 + 5) * 2", 1.0),
        ("2*(5+3)", 1.0),
        ("(3 + 5) × 2", 1.0),
        ("(3 + 5) * 2 = 16", 1.0),
        ("(3 + 5) * 2 = 17", 0.0),
        ("3 + 5 * 2", 0.1),  # well-formed, another value
        ("8 * 2", 0.1),  # the target from other numbers
        ("3 + 5 + 2 * 2 * 2", 0.1),  # a number more than once
        ("2 * 5 + 6", 0.1),
        ("16", 0.1),
        ("3 / (5 - 5) * 2", 0.1),
        ("(3 + 5 * 2", 0.0),
        ("3 + 5 +", 0.0),
        ("2 ** 4", 0.0),
        ("16 // 1", 0.0),
        ("sixteen", 0.0),
        ("__import__('os')", 0.0),
        ("3 5 2", 0.0),
        ("3, 5", 0.0),
        ("16.0", 0.0),
        ("2 (3 + 5)", 0.0),
        ("= 16", 0.0),
    ],
)
def test_rewards(answer, reward):
    env = with_puzzle([3, 5, 2], 16)
    _, got, terminated, _, info = env.step(answer)
    assert (got, terminated, info["success"]) == (reward, True, reward == 1.0)


def test_operators_outside_the_setting_are_not_well_formed():
    assert with_puzzle([3, 5, 2], 16, operations="+-").score("(3 + 5) * 2") == 0.0
    assert with_puzzle([3, 5, 2], 6, operations="+-").score("3 + 5 - 2") == 1.0
    assert with_puzzle([3, 5, 2], 4, operations="+*").score("-3 + 5 + 2") == 0.0


def test_fractions_on_the_way_are_exact():
    assert with_puzzle([8, 3, 8, 3], 24).score("8 / (3 - 8 / 3)") == 1.0
    assert with_puzzle([1, 3, 3, 7], 1).score("1 / 3 * 3 * 7") == 0.1


@pytest.mark.parametrize("params", [{}, {"operations": "+-"}, {"n_numbers": 4, "max_number": 50}, {"operations": "/"}])
def test_every_puzzle_has_its_solution(params):
    env = Countdown(**params)
    for seed in range(200):
        observation, _ = env.reset(seed=seed)
        facts = env.describe()
        assert observation == f"numbers {' '.join(map(str, facts['numbers']))} target {facts['target']}"
        assert 1 <= facts["target"] <= 100
        assert 1 <= min(facts["numbers"]) <= max(facts["numbers"]) <= env.max_number
        (plan,) = env.oracle()
        assert eval(plan.replace("/", "//")) == facts["target"] == eval(plan)  # all divisions come out even
        assert set(plan) - set("0123456789 ()") <= set(env.operations)
        assert env.step(plan)[1] == 1.0


def expressions():
    numbers = st.integers(0, 50).map(str)
    return st.recursive(
        numbers,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
            inner.map(lambda text: f"-{text}"),
        ),
        max_leaves=8,
    )


@given(expressions())
def test_values_are_those_of_exact_arithmetic(text):
    wrapped = "".join(f"Fraction({piece})" if piece.isdigit() else piece for piece in split_numbers(text))
    try:
        expected = eval(wrapped, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    parsed = parse_expression(text)
    if len(text) > MAX_LENGTH:
        assert parsed is None
    else:
        assert parsed.value == expected
        assert list(parsed.numbers) == [int(piece) for piece in split_numbers(text) if piece.isdigit()]


def split_numbers(text):
    pieces, digits = [], ""
    for character in text:
        if character.isdigit():
            digits += character
            continue
        pieces += [digits, character] if digits else [character]
        digits = ""
    return [*pieces, digits] if digits else pieces


@given(st.text(alphabet="0123456789+-*/() =.e_x\n", max_size=60) | st.text(max_size=30))
def test_no_text_breaks_the_scorer(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_puzzle([1, 2], 3).score(text) in (0.0, 0.1, 1.0)


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "(" * 50_000, "9*" * 99 + "9", "(" * 99 + "1" + ")" * 99, "-" * 199 + "1"]
)
def test_hostile_answers_cost_nothing(text):
    start = time.thread_time()
    assert with_puzzle([1, 2], 3).score(text) in (0.0, 0.1)
    assert time.thread_time() - start < 2.5


def test_the_example_in_the_instructions_is_well_formed():
    for operations in ("+", "-", "+-", "*/", "+-*/", "/"):
        env = Countdown(operations=operations)
        env.reset(seed=0)
        example = env.instructions.rpartition("for example ")[2]
        assert env.score(example) > 0, example


def test_bad_values_are_named():
    for params in ({"operations": "+%"}, {"operations": ""}, {"n_numbers": 1}, {"max_target": 0}):
        with pytest.raises(RecipeError, match=next(iter(params))):
            make("countdown", **params)


def test_a_wrong_answer_is_not_solved_however_much_its_form_earns():
    for answer, reward, solved in (("1 + 2", 1.0, True), ("1 * 2", 1.0, False), ("three", 0.0, False)):
        env = with_puzzle([1, 2], 3, format_reward=1.0)
        assert env.judge(answer) == (reward, solved)
        observation, given, terminated, _, info = env.step(answer)
        assert (given, terminated, info["success"]) == (reward, True, solved)
        assert observation == ("right" if solved else "wrong")
        assert env.optimal_success() == float(solved)
