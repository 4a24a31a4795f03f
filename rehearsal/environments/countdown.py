"""Countdown: combine a few numbers into a target."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from rehearsal.environments.arithmetic import Node, parse_expression
from rehearsal.environments.episode import EpisodeEnv, real_number, whole_number
from rehearsal.environments.splits import draw_in_split
from rehearsal.errors import RecipeError

_EQUALS = re.compile(r"(.*)=\s*(-?\d{1,12})\s*", re.DOTALL)


@dataclass(frozen=True)
class Puzzle:
    """Numbers in ascending order, a target, and one expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def content(self) -> str:
        return f"{' '.join(map(str, self.numbers))} = {self.target}"


def draw_puzzle(
    rng: np.random.Generator, n_numbers: int, max_number: int, max_target: int, operations: str
) -> Puzzle | None:
    """Combine random numbers at random into one, or return None where that leaves the allowed targets.

    Every intermediate result is a positive whole number.
    """
    nodes = [Node(int(number)) for number in rng.integers(1, max_number + 1, size=n_numbers)]
    numbers = tuple(sorted(node.value for node in nodes))
    while len(nodes) > 1:
        first = nodes.pop(int(rng.integers(len(nodes))))
        second = nodes.pop(int(rng.integers(len(nodes))))
        results = {"+": first.value + second.value, "*": first.value * second.value}
        if first.value > second.value:
            results["-"] = first.value - second.value
        if first.value % second.value == 0:
            results["/"] = first.value // second.value
        possible = [sign for sign in operations if sign in results]
        if not possible:
            return None
        sign = possible[int(rng.integers(len(possible)))]
        nodes.append(Node(results[sign], sign, first, second))
    target = nodes[0].value
    return Puzzle(numbers, target, str(nodes[0])) if target <= max_target else None


class Countdown(EpisodeEnv):
    """Reach a target with given numbers, each used exactly once, in one answer.

    The action is an expression such as ``(3 + 5) * 2``; "= 16" after it is allowed where it names the target.
    Rewards as published (TinyZero, github.com/Jiayi-Pan/TinyZero, and RAGEN):

    - 1 for an expression that uses each number exactly once and comes to the target;
    - ``format_reward``, 0.1, for any other expression that keeps the grammar: whole numbers, the allowed operators,
      parentheses;
    - 0 for anything else.

    Values are exact, so fractions on the way are fine. Mended here: the published prompt says that a number "can only
    be used once" while the checker demands each of them exactly once, so the instructions say so; training and
    validation were drawn from one file, here they differ in content. Every puzzle is made from a solution whose
    intermediate results are positive whole numbers.

    Args:
        n_numbers: how many numbers, 2 to 6.
        max_number: the largest number, from 2 on.
        max_target: the largest target.
        operations: the operators allowed in puzzles and answers, some of ``+-*/``. RAGEN keeps only puzzles that
            ``+-`` solves.
        format_reward: the reward of a well-formed wrong answer.

    Raises:
        RecipeError: for a parameter out of its range.
    """

    name = "countdown"
    max_turns = 1
    max_actions_per_turn = 1

    def __init__(
        self,
        n_numbers: int = 3,
        max_number: int = 10,
        max_target: int = 100,
        operations: str = "+-*/",
        format_reward: float = 0.1,
    ) -> None:
        super().__init__(max_steps=1)
        self.n_numbers = whole_number("n_numbers", n_numbers, 2, 6)
        self.max_number = whole_number("max_number", max_number, 2, 10_000)
        self.max_target = whole_number("max_target", max_target, 1, 1_000_000)
        self.format_reward = real_number("format_reward", format_reward, 0.0, 1.0)
        if not isinstance(operations, str) or not operations or set(operations) - set("+-*/"):
            raise RecipeError(f"operations must be some of the signs +-*/, such as '+-', not {operations!r}.")
        self.operations = "".join(sign for sign in "+-*/" if sign in operations)
        self._puzzle = Puzzle((), 0, "")
        self._answer = ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        example = "(3 + 5) * 2" if {"+", "*"} <= set(self.operations) else f"9 {self.operations[0]} (6 "
        if example.endswith("(6 "):
            example += f"{self.operations[-1]} 2)"
        return (
            f"Combine the numbers with {' '.join(self.operations)} and parentheses so that the result is the target. "
            f"Use each number exactly once.\nThe action is the expression, for example {example}"
        )

    def _draw(self, split: str) -> str:
        self._puzzle = draw_in_split(
            lambda: draw_puzzle(self.np_random, self.n_numbers, self.max_number, self.max_target, self.operations),
            lambda puzzle: puzzle.content,
            split,
        )
        self._answer = ""
        return self._puzzle.content

    def _foreseeable(self, action: str) -> bool:
        return True

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        self._answer = action
        reward, solved = self.judge(action)
        return reward, True, solved, True

    def score(self, answer: str) -> float:
        """The reward of an answer to the present puzzle; see the class for what earns what."""
        return self.judge(answer)[0]

    def judge(self, answer: str) -> tuple[float, bool]:
        """The reward of an answer to the present puzzle, and whether it solves it. The reward alone does not tell:
        ``format_reward`` may be as high as that of a right answer."""
        self._need_reset()
        stated = _EQUALS.fullmatch(answer)
        if stated:
            if int(stated[2]) != self._puzzle.target:
                return 0.0, False
            answer = stated[1]
        expression = parse_expression(answer)
        if expression is None or expression.operators - set(self.operations):
            return 0.0, False
        solved = expression.value == self._puzzle.target and tuple(sorted(expression.numbers)) == self._puzzle.numbers
        return (1.0 if solved else self.format_reward), solved

    def _observation(self) -> str:
        if self._over:
            return "right" if self._success else "wrong"
        return f"numbers {' '.join(map(str, self._puzzle.numbers))} target {self._puzzle.target}"

    def _state(self) -> str:
        return f"{self._puzzle.content} {self._answer}".strip()

    def oracle(self) -> list[str]:
        """One expression that reaches the target, or nothing once an answer was given."""
        self._need_reset()
        return [] if self._over else [self._puzzle.solution]

    def optimal_success(self) -> float:
        """1 before the answer, since every puzzle has a solution; afterwards 1 or 0."""
        self._need_reset()
        return float(self._success) if self._over else 1.0

    def describe(self) -> dict[str, Any]:
        """``numbers`` (ascending), ``target`` and ``operations``."""
        self._need_reset()
        return {"numbers": list(self._puzzle.numbers), "target": self._puzzle.target, "operations": self.operations}
