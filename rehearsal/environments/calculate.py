"""Calculate: sums and products beyond what a small model does in its head."""

from __future__ import annotations

import re
from typing import Any

from rehearsal.environments.arithmetic import parse_expression
from rehearsal.environments.episode import EpisodeEnv, whole_number
from rehearsal.environments.splits import draw_in_split
from rehearsal.errors import RecipeError

_NUMBER = re.compile(r"[-+]?\d{1,30}|[-+]?\d{1,3}(?:,\d{3}){1,9}")
_SIGNS = str.maketrans({"−": "-", "–": "-"})


class Calculate(EpisodeEnv):
    """Work out a line of arithmetic and answer with the number.

    The tasks are easy for a calculator and hard without one: a two-digit product takes a small model more digits of
    working than it can keep straight. So the environment shows whether an agent learns that a tool is useful; it brings
    none of its own (add ``calculator`` to the tools of a recipe).

    The reward is 1 for the right number and 0 for any other answer, which ends the episode either way. An answer may
    carry a sign, commas between groups of three digits, and "= " before it; anything else in it is wrong.

    Lines are of a few kinds (``info["category"]``), by whether there is anything to multiply and by the digits of the
    longest number: "sum of 1 digit", "product of 3 digits".

    Args:
        terms: how many numbers a line has, 2 to 8.
        digits: the most digits of one of them, 1 to 6.
        operations: the operators, some of ``+-*``. Products bind tighter, as they do everywhere.
        turns: turns of an episode: what tools may take, and the answer.

    Raises:
        RecipeError: for a parameter out of its range.
    """

    name = "calculate"
    max_turns = 4
    max_actions_per_turn = 1

    def __init__(self, terms: int = 3, digits: int = 3, operations: str = "+-*", turns: int = 4) -> None:
        super().__init__(max_steps=1)
        self.terms = whole_number("terms", terms, 2, 8)
        self.digits = whole_number("digits", digits, 1, 6)
        self.max_turns = whole_number("turns", turns, 1, 64)
        if not isinstance(operations, str) or not operations or set(operations) - set("+-*"):
            raise RecipeError(f"operations must be some of the signs +-*, such as '+-', not {operations!r}.")
        self.operations = "".join(sign for sign in "+-*" if sign in operations)
        self._line = ""
        self._solution = 0
        self._answer = ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        return "Work out the line of arithmetic. The action is the number that it comes to, for example 1234."

    def _draw(self, split: str) -> str:
        self._line = draw_in_split(self._random_line, lambda line: line, split)
        self._solution = _value(self._line)
        self._answer = ""
        return self._line

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode, and tell what kind of line it is; see :meth:`EpisodeEnv.reset`."""
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "category": kind_of(self._line)}

    def _random_line(self) -> str:
        rng = self.np_random
        # A number of few digits is as likely as one of many, so that there is something to begin with.
        sizes = rng.integers(1, self.digits + 1, size=self.terms)
        numbers = [int(rng.integers(10 ** (size - 1) if size > 1 else 1, 10**size)) for size in sizes.tolist()]
        signs = [self.operations[int(place)] for place in rng.integers(len(self.operations), size=self.terms - 1)]
        line = str(numbers[0])
        for sign, number in zip(signs, numbers[1:], strict=True):
            line += f" {sign} {number}"
        return line

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        self._answer = action
        right = read_number(action) == self._solution
        return float(right), True, right, True

    def _observation(self) -> str:
        if self._over:
            return "right" if self._success else "wrong"
        return self._line

    def _state(self) -> str:
        return f"{self._line} {self._answer}".strip()

    def oracle(self) -> list[str]:
        """The number, or nothing once an answer was given."""
        self._need_reset()
        return [] if self._over else [str(self._solution)]

    def optimal_success(self) -> float:
        """1 before the answer; afterwards 1 or 0."""
        self._need_reset()
        return float(self._success) if self._over else 1.0

    def describe(self) -> dict[str, Any]:
        """``line``, the arithmetic."""
        self._need_reset()
        return {"line": self._line}


def kind_of(line: str) -> str:
    """The kind of a line of arithmetic, such as "product of 3 digits": whether anything is multiplied in it, and the
    digits of its longest number."""
    digits = max(len(part) for part in line.split()[::2])
    return f"{'product' if '*' in line else 'sum'} of {digits} digit{'' if digits == 1 else 's'}"


def read_number(text: str) -> int | None:
    """The whole number that an answer is, or None if it is something else."""
    cleaned = text.strip().translate(_SIGNS).removeprefix("=").strip()
    return int(cleaned.replace(",", "")) if _NUMBER.fullmatch(cleaned) else None


def _value(line: str) -> int:
    expression = parse_expression(line)
    assert expression is not None and expression.value is not None
    return int(expression.value)
