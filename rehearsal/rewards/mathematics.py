"""Answers that are numbers or formulas."""

from __future__ import annotations

import collections
import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import answer_of, reference_texts
from rehearsal.rewards.verifier import Score, Task, VerificationError

# --- formulas ---------------------------------------------------------------------------------------------------------


_ANCHOR = re.compile(r"\banswer\b[^.\n]{0,40}?(?:\bis\b|\bbe\b|[:=])", re.IGNORECASE)
_CURRENCY = re.compile(r"\$(?=\d[^$]*?(?<![\\A-Za-z])[A-Za-z]{2,}[^$]*\$)")
"""A dollar sign before a number whose partner is behind words: money, not mathematics."""

_SIGNED = r"[-+\N{MINUS SIGN}(]*[$€£¥]?\s?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_CANDIDATE = re.compile(
    r"\$\$(?P<display>.+?)\$\$|\\\[(?P<bracket>.+?)\\\]|(?<!\\)\$(?P<inline>[^$\n]+)\$|\\\((?P<round>.+?)\\\)"
    r"|(?P<fraction>-?\\[dt]?frac\{[^{}]*\}\{[^{}]*\})"
    rf"|(?<![\w.,])(?P<plain>{_SIGNED}(?:\)*\s?[-+*/^×÷]+\s?{_SIGNED})*\)*(?:\s?\\?%)?)",
    re.DOTALL,
)
_GOES_ON = re.compile(r"[.,]?\d|\s?[*/^×÷]+\s?[\w(]|_\w|[xyzπ](?![A-Za-z])")
"""What must not follow a plain expression: then it is a piece of something else, such as the 3.14 of 3.14.15."""


@dataclass(frozen=True)
class Mathematics:
    """Equality of formulas, by math-verify (github.com/huggingface/Math-Verify): 1/2 is 0.5 is ``\\frac{1}{2}``.

    The answer is what is boxed (several boxes are a set); or else the first formula or number behind the last "answer
    is" or "answer:"; or else the last one. It is parsed and compared with the reference numerically and symbolically.
    Value 1 or 0. Percentages follow the library: 18% matches 18.

    It has no time limit of its own, since that of the library is a signal, which works in no thread but the main one:
    run it in a :class:`rehearsal.rewards.pool.VerifierPool`, which has one.

    What differs from the library's own extraction: that takes 98 out of "answer: **98/3**" and out of "98/(3", since
    its pattern for a number may end anywhere; here an expression is read as a whole or not at all. What cannot be
    parsed is not compared as a text, an error in a comparison is an error and not a wrong answer, and a reference
    needs no dollar signs. And the library holds the square of infinity and its like for equal to every number: what is
    not finite equals nothing that is, and what would also equal the reference plus 1 is no answer.

    Attributes:
        boxed: only an answer in ``\\boxed{}`` counts.

    Raises:
        RewardError: if the library is not installed.
        VerificationError: for a reference that is no formula, or a comparison that fails.
    """

    boxed: bool = False
    name: str = "math"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("Checking formulas needs the library math-verify: pip install 'rehearsal[math]'.")

    def warm_up(self) -> None:
        self.verify("\\boxed{\\frac{1}{2}}", Task("", "0.5"))

    def verify(self, completion: str, task: Task) -> Score:
        golds = [_gold(text) for text in reference_texts(task)]
        answer = formula_in(answer_of(completion), self.boxed)
        try:
            found = _parsed(answer) if answer else []
            right = bool(found) and any(_equal(gold, found) for gold in golds)
        except Exception as problem:
            told = f"{type(problem).__name__}: {problem}"[:200]
            raise VerificationError(f"The formula {answer[:80]!r} could not be compared ({told}).") from problem
        if not found:
            return Score(0.0, False, evidence="there is no formula in the answer that can be read")
        return Score(float(right), right, evidence=f"{_shown(found)} {'is' if right else 'is not'} {_shown(golds[0])}")


def formula_in(answer: str, boxed: bool = False) -> str:
    """The formula of an answer as boxed LaTeX, "" if there is none; see :class:`Mathematics`.

    Args:
        answer: without thought and tags.
        boxed: whether it must be boxed already.
    """
    if "\\boxed" in answer:
        return ", ".join(f"\\boxed{{{content}}}" for content in _boxes(answer))
    if boxed:
        return ""
    # Two stars between numbers are a power, all others are emphasis.
    text = re.sub(r"(?<=[\d)])\s?\*\*\s?(?=[\d(-])", "^", answer)
    text = _CURRENCY.sub("", text.replace("**", "").replace("`", ""))
    anchors = list(_ANCHOR.finditer(text))
    behind = _CANDIDATE.search(text, anchors[-1].end()) if anchors else None
    chosen = behind or next(iter(collections.deque(_CANDIDATE.finditer(text), maxlen=1)), None)
    if chosen is None or (chosen["plain"] and _GOES_ON.match(text, chosen.end())):
        return ""
    content = next(group for group in chosen.groups() if group is not None)
    if chosen["plain"]:
        content = re.sub(r"[$€£¥]", "", content).replace("\N{MINUS SIGN}", "-").rstrip(", ")
        content = re.sub(r"\\?%", r"\\%", content)
    return f"\\boxed{{{content}}}"


def _boxes(text: str) -> list[str]:
    """What is boxed, without dollar signs; nothing where a box is not closed or holds another one."""
    contents = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for brace in re.finditer(r"(?<!\\)[{}]", text[start.end() :]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                contents.append(text[start.end() : start.end() + brace.start()].replace("$", ""))
                break
        else:
            return []
    return [] if any("\\boxed" in content for content in contents) else contents


def _equal(gold: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether the library holds them for equal, and does not hold the answer for equal to anything."""
    from math_verify import verify
    from sympy import Expr, Integer, Number, nan, oo, zoo

    def same(one: Any) -> bool:
        return bool(verify([one], list(found), timeout_seconds=None, raise_on_error=True))

    def is_finite(one: Any) -> bool:
        return not one.has(oo, -oo, zoo, nan)

    if all(map(is_finite, gold)) and not all(map(is_finite, found)):
        return False  # and comparing them may take minutes
    if not any(same(one) for one in gold):
        return False
    if all(isinstance(expression, Number) for expression in found):
        return True
    # Some expressions compare equal to every number. A control that they cannot equal as well gives them away.
    return not any(same(one + 1 if isinstance(one, Expr) else Integer(-98765)) for one in gold)


def _shown(expressions: Sequence[Any]) -> str:
    try:
        return str(expressions[0])[:200]
    except Exception:  # printing a huge number may fail
        return "a formula too large to print"


@functools.lru_cache(maxsize=4096)
def _gold(text: str) -> tuple[Any, ...]:
    """A parsed reference. The answers of a group share it, and parsing takes as long as comparing."""
    marked = text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"
    try:
        found = _parsed(marked)
    except Exception as problem:
        raise VerificationError(f"The reference {text[:80]!r} cannot be parsed ({problem}).") from problem
    if not found:
        raise VerificationError(
            f"The reference {text[:80]!r} is no formula; write it in LaTeX or compare it by exact match."
        )
    return tuple(found)


@functools.cache
def _configuration() -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig

    # It warns that there is no time limit; the pool has one.
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return (LatexExtractionConfig(boxed_match_priority=0),)


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, _configuration(), fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True))


# --- last numbers -----------------------------------------------------------------------------------------------------

_MINUS = "-\N{MINUS SIGN}\N{EN DASH}"
_NUMBER = re.compile(
    # A sign that is not an operator: nothing that could be subtracted from stands before it.
    rf"(?:(?<![\w).%])(?P<sign>[{_MINUS}+]))?"
    r"(?P<currency>[$€£¥]\s?)?"
    rf"(?P<inner>(?<=[$€£¥])[{_MINUS}])?"
    r"(?<![A-Za-z_\d.,])(?P<digits>\.?\d[\d.,]*)(?P<exponent>[eE][+-]?\d+(?!\w))?"
    r"(?P<below>(?:\s?/\s?\d[\d.,]*)*)"
)
_PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MOST_DIGITS = 400
"""A number of more digits is not read: it is no answer to anything, and reading it would take for ever."""


@dataclass(frozen=True)
class LastNumber:
    """The last number of the answer, as GSM8K is scored (github.com/openai/grade-school-math).

    Numbers may have a sign, a currency, thousands separated by commas, decimals, an exponent, a dot behind them, or be
    a fraction such as 3/4; they are compared exactly. What only looks like a number (1,2,3 or 3.14.15) is no answer,
    and neither is a digit inside a word (CO2). The gold answer stands after ``####`` where the reference has that.

    Only the last number counts, so that listing guesses gains nothing. Value 1 or 0.

    Raises:
        VerificationError: for a reference without a number.
    """

    name: str = "gsm8k"

    def verify(self, completion: str, task: Task) -> Score:
        golds = []
        for text in reference_texts(task):
            gold = last_number(text.rpartition("####")[2])
            if gold is None:
                raise VerificationError(f"The reference {text[-80:]!r} has no number in it.")
            golds.append(gold)
        answer = answer_of(completion)
        found = last_number(answer)
        if found is None:
            return Score(0.0, False, evidence="the answer does not end in a number that can be read")
        right = found in golds
        return Score(
            float(right), right, evidence=f"{_decimal(found)} {'is' if right else 'is not'} {_decimal(golds[0])}"
        )


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None if there is none or it cannot be read."""
    matches = collections.deque(_NUMBER.finditer(text), maxlen=1)
    if not matches:
        return None
    last = matches[0]
    value = _value(last["digits"])
    if value is None:
        return None
    if last["exponent"]:
        digits = last["exponent"][1:].lstrip("+-0")
        if len(digits) > 4 or int(digits or 0) > _MOST_DIGITS:
            return None
        value *= Fraction(10) ** int(last["exponent"][1:])
    for digits in last["below"].split("/")[1:]:
        below = _value(digits.strip())
        if not below:
            return None
        value /= below
    signs = (last["sign"] or "") + (last["inner"] or "")
    return -value if any(sign in _MINUS for sign in signs) else value


def _value(digits: str) -> Fraction | None:
    digits = digits.rstrip(".,")
    if len(digits) > _MOST_DIGITS:
        return None
    if _GROUPED.fullmatch(digits):
        digits = digits.replace(",", "")
    # Other scripts have digits too, which Fraction would take.
    return Fraction(digits) if digits.isascii() and _PLAIN.fullmatch(digits) else None


def _decimal(value: Fraction) -> str:
    return str(value) if value.denominator == 1 or len(str(value)) < 12 else f"{float(value):g}"
