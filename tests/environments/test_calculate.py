"""Calculate: what counts as the right number, and what the lines are like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.environments.calculate import Calculate, kind_of, read_number
from rehearsal.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1234", 1234), (" 1234 ", 1234), ("= 1234", 1234), ("1,234", 1234), ("-7", -7), ("−7", -7), ("+7", 7),
        ("1,234,567", 1234567), ("007", 7),
        ("12,34", None), ("1234.0", None), ("1234 or 1235", None), ("1e3", None), ("", None), ("= ", None),
        ("--7", None), ("12 34", None), ("seven", None), ("47 * 86", None), ("9" * 40, None), ("==7", None), ("٣", 3),
    ],
)  # fmt: skip
def test_what_an_answer_is(text, number):
    assert read_number(text) == number


@given(st.text())
def test_no_text_is_too_odd(text):
    env = Calculate()
    env.reset(seed=0)
    if text.strip():
        assert env.step(text.strip())[1] in (0.0, 1.0)


def test_only_the_right_number_is_right():
    env = Calculate()
    for seed in range(50):
        line, _ = env.reset(seed=seed)
        right = eval(line)
        assert env.oracle() == [str(right)]
        assert env.step(f"{right:,}")[1] == 1.0
        env.reset(seed=seed)
        said, reward, terminated, _, info = env.step(str(right + 1))
        assert (said, reward, terminated, info["success"]) == ("wrong", 0.0, True, False)


def test_lines_have_what_was_asked_for():
    env = Calculate(terms=5, digits=2, operations="+-")
    lines = [env.reset(seed=seed)[0].split() for seed in range(100)]
    assert all(len(line) == 9 for line in lines)
    assert {sign for line in lines for sign in line[1::2]} == {"+", "-"}
    sizes = [len(number) for line in lines for number in line[::2]]
    # As many short numbers as long ones.
    assert set(sizes) == {1, 2} and 0.4 < sizes.count(1) / len(sizes) < 0.6
    assert all(int(number) > 0 for line in lines for number in line[::2])


@pytest.mark.parametrize(
    ("params", "told"),
    [({"terms": 1}, "terms"), ({"digits": 7}, "digits"), ({"operations": "/"}, "operations"), ({"turns": 0}, "turns")],
)
def test_parameters_out_of_range(params, told):
    with pytest.raises(RecipeError, match=told):
        Calculate(**params)


def test_lines_are_of_a_few_kinds():
    env = Calculate()
    kinds = set()
    for seed in range(600):
        line, info = env.reset(seed=seed)
        kinds.add(info["category"])
        assert info["category"].startswith("product" if "*" in line else "sum")
        assert max(len(number) for number in line.split()[::2]) == int(info["category"].split()[2])
    assert len(kinds) == 6
    assert kind_of("7 - 9") == "sum of 1 digit"
