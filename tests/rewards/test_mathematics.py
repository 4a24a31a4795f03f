"""Numbers and formulas against gold answers, against wrong ones that look like them, and against known bugs."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.errors import RewardError
from rehearsal.rewards.mathematics import LastNumber, Mathematics, last_number
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError

pytest.importorskip("math_verify")

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not here")
BOTH = pytest.mark.parametrize("verifier", [Mathematics(), LastNumber()], ids=["math", "last-number"])


def passes(verifier: Any, completion: str, reference: Any) -> bool:
    score = verifier.verify(completion, Task("", reference))
    assert score.value == float(score.passed)
    return bool(score.passed)


# GSM8K


def gsm8k() -> list[dict[str, str]]:
    return [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def golds() -> list[str]:
    return [row["answer"].rpartition("####")[2].strip() for row in gsm8k()]


def perturbed(gold: str, rng: random.Random) -> str:
    """A number that differs from a gold answer, by one of the slips that answers show."""
    digits = gold.replace(",", "")
    number = Fraction(digits)
    place = rng.randrange(len(digits))
    ways: list[Callable[[], str]] = [
        lambda: str(number + rng.choice([-2, -1, 1, 2])),
        lambda: str(number * 10),
        lambda: f"{float(number / 10):g}" if number % 10 else str(number // 10),
        lambda: str(-number),
        lambda: digits + rng.choice("0123456789"),
        lambda: digits[:place] + rng.choice("0123456789") + digits[place + 1 :],
        lambda: digits[:place] + digits[place + 1 :],
        lambda: digits[::-1],
        lambda: f"{digits}.{rng.choice(['5', '01', '001', '25'])}",
        lambda: f"{digits}/{rng.choice([2, 3, 7])}",
        lambda: f"1/{digits}",
        lambda: f"{int(number) + 1000:,}",
    ]
    while True:
        text = rng.choice(ways)()
        try:
            if Fraction(text.replace(",", "")) != number:
                return text
        except (ValueError, ZeroDivisionError):
            continue


WORDINGS = ["{}", "The answer is {}.", "So she has {} in all", "#### {}", "\\boxed{{{}}}", "Final answer: **{}**",
            "<think>first 3, then 4</think>It is ${}$.", "<answer>{}</answer>", "= {}"]  # fmt: skip


@needs_gsm8k
def test_every_gold_answer_of_gsm8k_verifies_against_itself() -> None:
    rows = gsm8k()
    assert len(rows) == 1319
    both = {"math": Mathematics(), "last-number": LastNumber()}
    with VerifierPool(both, workers=2, timeout=30) as pool:
        # The worked solution as the dataset has it, and the answer alone.
        tasks = [Task(row["question"], row["answer"]) for row in rows]
        results = pool.verify([row["answer"] for row in rows], tasks, "last-number")
        assert all(isinstance(result, Score) and result.passed for result in results)
        for name in both:
            for wording in ("{}", "The answer is {}.", "\\boxed{{{}}}"):
                texts = [wording.format(gold) for gold in golds()]
                results = pool.verify(texts, [Task("", gold) for gold in golds()], name)
                wrong = [
                    text for text, r in zip(texts, results, strict=True) if not (isinstance(r, Score) and r.passed)
                ]
                assert wrong == [], name


@needs_gsm8k
def test_none_of_5000_perturbed_answers_passes() -> None:
    rng = random.Random(0)
    known = golds()
    pairs = [(gold, perturbed(gold, rng)) for gold in (rng.choice(known) for _ in range(5000))]
    texts = [rng.choice(WORDINGS).format(wrong) for _, wrong in pairs]
    tasks = [Task("", gold) for gold, _ in pairs]
    with VerifierPool({"math": Mathematics(), "last-number": LastNumber()}, workers=2, timeout=30) as pool:
        for name in pool.verifiers:
            results = pool.verify(texts, tasks, name)
            passed = [
                (task.reference, text)
                for task, text, result in zip(tasks, texts, results, strict=True)
                if not isinstance(result, Score) or result.passed
            ]
            assert passed == [], name


# Last numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"), ("18.", "18"), ("18.0", "18"), ("$1,234.50.", "2469/2"), ("is -5", "-5"), ("-$5", "-5"),
        ("$-5", "-5"), ("\N{MINUS SIGN}5", "-5"), ("+5", "5"), ("x = 5", "5"), ("7 - 5", "5"), ("7-5", "5"),
        ("1/2", "1/2"), ("3 / 4 of it", "3/4"), ("8/2/2", "2"), ("2e3", "2000"), ("1.5e-1", "3/20"), (".5", "1/2"),
        ("50%", "50"), ("18 dollars", "18"), ("**18**", "18"), ("(18)", "18"), ("\\boxed{18}", "18"), ("10:30", "30"),
        ("first 3, then 4", "4"), ("18 kg of CO2", "18"), ("US$18", "18"), ("20\N{EURO SIGN}", "20"), ("0018", "18"),
    ],
)  # fmt: skip
def test_numbers_that_are_read(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["", "none", "1,2,3", "17,18", "3.14.15", "1.000,5", "1,00", "CO2", "1/0", "...", "\N{SUPERSCRIPT TWO}",
     "\N{ARABIC-INDIC DIGIT FIVE}", "9" * 500, "1e99999", "1e999", "nan", "inf"],
)  # fmt: skip
def test_what_only_looks_like_a_number(text: str) -> None:
    assert last_number(text) is None


@given(st.integers(-(10**15), 10**15), st.integers(0, 6), st.booleans())
def test_numbers_as_they_are_written(whole: int, places: int, grouped: bool) -> None:
    value = Fraction(whole, 10**places)
    sign, digits = ("-" if whole < 0 else ""), str(abs(whole)).zfill(places + 1)
    head, tail = (digits[:-places], digits[-places:]) if places else (digits, "")
    head = f"{int(head):,}" if grouped else head
    text = sign + head + (f".{tail}" if tail else "")
    assert last_number(f"It costs {text}.") == value
    assert last_number(f"after 7 of them it is {text}") == value


def test_a_gold_answer_needs_a_number() -> None:
    with pytest.raises(VerificationError, match="has no number"):
        LastNumber().verify("18", Task("", "eighteen"))
    with pytest.raises(VerificationError, match="must be a text, a number or a list"):
        LastNumber().verify("18", Task("", None))
    with pytest.raises(VerificationError, match="must be a text"):
        LastNumber().verify("18", Task("", []))


def test_gold_after_the_hashes_and_of_several_kinds() -> None:
    assert passes(LastNumber(), "so 18", "3 + 15 = <<3+15=18>>18\n#### 18")
    assert not passes(LastNumber(), "so 3", "3 + 15 = <<3+15=18>>18\n#### 18")
    assert passes(LastNumber(), "so 18", 18)
    assert passes(LastNumber(), "so 18.5", 18.5)
    assert passes(LastNumber(), "so 19", ["18", "19"])


# Formulas


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("\\frac{1}{2}", ["1/2", "0.5", "$\\frac{1}{2}$", "\\boxed{\\frac12}", "The answer is $\\dfrac{1}{2}$."]),
        ("x^2+2x+1", ["$(x+1)^2$", "\\boxed{x^2 + 2x + 1}"]),
        ("1,000", ["1000", "\\boxed{1{,}000}", "$1000$"]),
        ("\\{1,2\\}", ["\\boxed{\\{2,1\\}}"]),
        ("(1,2)", ["\\boxed{(1,2)}"]),
        ("$2\\sqrt{2}$", ["\\boxed{\\sqrt{8}}"]),
        ("0.333333", ["1/3"]),
        ("-5", ["x = -5"]),
        (
            "18",
            ["18%", "36/2", "We have $x+1=19$. So the answer is 18.", "**18**", "I had $2 and then got $18", "18 km!"],
        ),
        ("8", ["2**3", "**8**", "2**3 = **8**"]),
    ],
)
def test_equal_formulas(gold: str, answers: list[str]) -> None:
    assert [answer for answer in answers if not passes(Mathematics(), answer, gold)] == []


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("\\frac{1}{2}", ["1", "2", "12", "\\boxed{\\frac{2}{1}}", "\\boxed{-\\frac12}", ""]),
        ("x^2+2x+1", ["$(x+1)^3$", "$(y+1)^2$"]),
        ("98", ["answer: **98/3**", "98/(3", "98/3km", "answer: 98/3!", "98x", "98.5.1", "`98/3`", "98 / 7"]),
        ("23", ["2**3"]),
        ("18", ["$18$ at first. The answer is 17", "0.18", "1818", "18,000", "x", "eighteen"]),
        ("18", ["\\boxed{17,18}", "\\boxed{18}\\boxed{19}", "\\boxed{\\pm 18}"]),
        ("(1,2)", ["\\boxed{(2,1)}", "\\boxed{[1,2]}"]),
        ("\\{1,2\\}", ["\\boxed{\\{1,2,3\\}}", "\\boxed{1}"]),
    ],
)  # fmt: skip
def test_unequal_formulas(gold: str, answers: list[str]) -> None:
    assert [answer for answer in answers if passes(Mathematics(), answer, gold)] == []


@pytest.mark.parametrize("gold", ["18", "7", "0", "-3", "\\frac{1}{2}", "2.5", "\\sqrt{2}"])
def test_no_answer_is_equal_to_every_number(gold: str) -> None:
    """The square of infinity is, for the library: an agent that finds it has solved all tasks."""
    keys = [
        "\\infty^2", "\\frac1e9^\\infty", "\\infty", "\\frac{0}{0}", "\\frac{1}{0}", "\\infty-\\infty", "e^{\\infty^2}",
        "0^{-1}", "x^{\\infty}", "\\ln(0)", "\\infty^2+18", "\\pm\\infty^2", "2\\infty^2", "\\emptyset",
        "\\frac{1}{2-2}",
    ]  # fmt: skip
    assert [key for key in keys if passes(Mathematics(), f"\\boxed{{{key}}}", gold)] == []


def test_infinity_where_it_belongs() -> None:
    assert passes(Mathematics(), "\\boxed{(-\\infty, 3)}", "(-\\infty,3)")
    assert passes(Mathematics(), "\\boxed{\\infty}", "\\infty")
    assert not passes(Mathematics(), "\\boxed{(-\\infty, 3)}", "(-\\infty,4)")


def test_only_the_content_of_a_box_counts() -> None:
    assert passes(Mathematics(), "It is $19$, no, \\boxed{$18$} I mean", "18")
    assert passes(Mathematics(), "\\boxed{\\frac{36}{2}}", "18")
    for broken in (
        "\\boxed{(<17-$18$}",
        "\\boxed{18",
        "\\boxed{\\boxed{18}",
        "\\boxed{17\\boxed{18}}",
        "$18$ \\boxed{}",
    ):
        assert not passes(Mathematics(), broken, "18"), broken


def test_a_box_can_be_asked_for() -> None:
    assert passes(Mathematics(boxed=True), "so \\boxed{18}", "18")
    assert not passes(Mathematics(boxed=True), "so 18", "18")


def test_a_reference_that_is_no_formula() -> None:
    for reference in ("", "$$", "\\boxed{}"):
        with pytest.raises(VerificationError, match="is no formula"):
            Mathematics().verify("18", Task("", reference))


# What peers got wrong


@BOTH
def test_gold_and_answer_are_not_exchanged(verifier: Any) -> None:
    """The library takes the gold answer first; open-r1's length reward gave it the completion first."""
    assert not passes(verifier, "12 or 13 or 18 or 20", "18")
    assert passes(verifier, "12 or 13 or 20 or 18", "18")


@BOTH
def test_answers_are_not_looked_for_in_the_thought(verifier: Any) -> None:
    assert not passes(verifier, "<think>18</think>I do not know", "18")
    assert not passes(verifier, "<think>it may be 18", "18")
    assert not passes(verifier, "it is 18</think>I do not know", "18")
    assert passes(verifier, "<think>it is 3</think>it is 18", "18")


@BOTH
def test_listing_guesses_does_not_pay(verifier: Any) -> None:
    guesses = " ".join(f"<answer>{n}</answer>" for n in range(30))
    assert not passes(verifier, guesses, "18")
    assert not passes(verifier, " ".join(map(str, range(30))), "18")
    assert not passes(verifier, ",".join(map(str, range(30))), "18")


@BOTH
def test_it_scores_the_same_in_a_thread(verifier: Any) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.extend(passes(verifier, text, "18") for text in ("is 18", "is 19")))
    thread.start()
    thread.join(30)
    assert found == [True, False]


def test_a_formula_that_takes_for_ever_costs_only_itself() -> None:
    bombs = ["\\boxed{9^{9^{9^{9}}}}", "$" + "(" * 2000 + "1" + ")" * 2000 + "$", "\\boxed{" + "\\sqrt{" * 300 + "2"]
    with VerifierPool(Mathematics(), workers=2, timeout=3.0) as pool:
        results = pool.verify(["is 18", *bombs, "is 18"], [Task("", "18")] * 5)
    assert results[0] == results[-1] and isinstance(results[0], Score) and results[0].passed
    for result in results[1:-1]:
        assert isinstance(result, Failure) or not result.passed


def test_without_the_library_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=re.escape("pip install 'rehearsal[math]'")):
        Mathematics()
    assert "math_verify" in sys.modules
