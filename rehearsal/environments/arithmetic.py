"""Arithmetic expressions over whole numbers: parsed by grammar, never evaluated as Python.

An expression has whole numbers, the four operators, a sign and parentheses; values are exact fractions. Its length is
bounded, and there are no powers, so no answer can cost more than microseconds.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from fractions import Fraction

from rehearsal.parsing import parse_python

MAX_LENGTH = 200
"""Characters; a longer text is not an expression."""

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_ALLOWED = re.compile(r"[0-9+\-*/() \t]+")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


@dataclass(frozen=True)
class Expression:
    """What an expression comes to.

    Attributes:
        value: its exact value, None where it divides by zero.
        numbers: the numbers in it, from left to right.
        operators: the operators that it uses; a leading minus counts as "-".
    """

    value: Fraction | None
    numbers: tuple[int, ...]
    operators: frozenset[str]


def parse_expression(text: str) -> Expression | None:
    """Parse ``text``, or return None where it is not an expression.

    Typographic signs for times, division and minus are read as ``*``, ``/`` and ``-``.
    """
    text = text.translate(_SIGNS).strip()
    if len(text) > MAX_LENGTH or not _ALLOWED.fullmatch(text):
        return None
    try:
        tree = parse_python(text, "eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    numbers: list[int] = []
    operators: set[str] = set()

    def visit(node: ast.expr) -> Fraction | None:
        """The value of a node, None where it is undefined; raises ValueError for what the grammar does not have."""
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operators.add("-")
            inner = visit(node.operand)
            return None if inner is None else -inner
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            sign = _OPERATORS[type(node.op)]
            operators.add(sign)
            left, right = visit(node.left), visit(node.right)
            if left is None or right is None or (sign == "/" and right == 0):
                return None
            return combine(sign, left, right)
        raise ValueError("not part of the grammar")

    try:
        value = visit(tree.body)
    except ValueError:
        return None
    return Expression(value, tuple(numbers), frozenset(operators))


def combine(sign: str, left: Fraction, right: Fraction) -> Fraction:
    """``left sign right``; the caller keeps ``right`` from being zero in a division."""
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return left / right


@dataclass(frozen=True)
class Node:
    """A binary tree of whole numbers, to write an expression with as few parentheses as it needs.

    Attributes:
        value: the value of the (sub-)expression.
        sign: the operator, "" for a plain number.
        left: the first operand, None for a plain number.
        right: the second operand, None for a plain number.
    """

    value: int
    sign: str = ""
    left: Node | None = None
    right: Node | None = None

    def __str__(self) -> str:
        if self.left is None or self.right is None:
            return str(self.value)
        left, right = str(self.left), str(self.right)
        if _binds(self.left) < _binds(self):
            left = f"({left})"
        if _binds(self.right) < _binds(self) or (_binds(self.right) == _binds(self) and self.sign in "-/"):
            right = f"({right})"
        return f"{left} {self.sign} {right}"


def _binds(node: Node) -> int:
    return 3 if not node.sign else 2 if node.sign in "*/" else 1
