"""Bugs as people make them: what can be broken in a correct program, each a change of a line or two."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rehearsal.parsing import parse_python


class Bug(NamedTuple):
    """A change that may break a program.

    Attributes:
        kind: what sort of mistake it is; one of :data:`KINDS`.
        first, last: the lines of the correct program that it replaces, from 0, without ``last``.
        lines: what stands there instead.
    """

    kind: str
    first: int
    last: int
    lines: tuple[str, ...]


KINDS = (
    "comparison", "operator", "order", "off by one", "initial value", "constant", "variable", "function", "logic",
    "condition", "branches", "missing case", "missing line", "indentation",
)  # fmt: skip

_COMPARISONS: dict[str, tuple[str, ...]] = {
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",),
    "in": ("not in",), "not in": ("in",),
}  # fmt: skip
_OPERATORS = {"+": ("-",), "-": ("+",), "*": ("+",), "//": ("%",), "%": ("//",)}
_ASSIGNMENTS = {"+=": ("-=", "="), "-=": ("+=",), "*=": ("+=", "="), "//=": ("-=",)}
_FUNCTIONS = {"min": "max", "max": "min", "upper": "lower", "append": "remove"}
_STEP = "    "


def draw_bugs(rng: np.random.Generator, lines: Sequence[str], count: int) -> tuple[Bug, ...] | None:
    """So many bugs in different lines, each kind as likely as any other that there is; None if there are too few."""
    possible = possible_bugs(lines)
    chosen: list[Bug] = []
    while len(chosen) < count:
        possible = [bug for bug in possible if all(bug.last <= one.first or one.last <= bug.first for one in chosen)]
        kinds = sorted({bug.kind for bug in possible})
        if not kinds:
            return None
        kind = kinds[int(rng.integers(len(kinds)))]
        of_kind = [bug for bug in possible if bug.kind == kind]
        chosen.append(of_kind[int(rng.integers(len(of_kind)))])
    return tuple(sorted(chosen, key=lambda bug: bug.first))


def with_bugs(lines: Sequence[str], bugs: Sequence[Bug]) -> tuple[str, ...]:
    """A program with bugs that do not overlap."""
    broken = list(lines)
    for bug in sorted(bugs, key=lambda bug: bug.first, reverse=True):
        broken[bug.first : bug.last] = bug.lines
    return tuple(broken)


def possible_bugs(lines: Sequence[str]) -> list[Bug]:
    """Everything that can be broken in a program, each change once."""
    tree = parse_python("\n".join(lines))
    text = _Text(lines)
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    found: dict[tuple[int, int, tuple[str, ...]], Bug] = {}
    for node in nodes:
        for bug in (*_in_expression(node, text), *_in_names(node, text, sorted(names)), *_in_statement(node, text)):
            if bug.lines != tuple(lines[bug.first : bug.last]):
                found.setdefault(bug[1:], bug)
    return list(found.values())


class _Text:
    """The source of a program, for changes by position. Programs are plain ASCII."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines

    def of(self, node: ast.expr) -> str:
        return self.lines[node.lineno - 1][node.col_offset : node.end_col_offset]

    def between(self, left: ast.expr, right: ast.expr) -> tuple[int, int, str]:
        """The columns between two expressions of a line, and what stands there."""
        first, last = left.end_col_offset, right.col_offset
        assert first is not None
        return first, last, self.lines[left.lineno - 1][first:last]

    def changed(self, kind: str, line: int, first: int, last: int, new: str) -> Bug:
        """The bug that puts ``new`` in place of some columns of a line, counted from 1 as in a syntax tree."""
        old = self.lines[line - 1]
        return Bug(kind, line - 1, line, (old[:first] + new + old[last:],))

    def replaced(self, kind: str, node: ast.expr, new: str) -> Bug:
        assert node.end_col_offset is not None
        return self.changed(kind, node.lineno, node.col_offset, node.end_col_offset, new)


def _in_expression(node: ast.AST, text: _Text) -> Iterator[Bug]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        first, last, sign = text.between(node.left, node.comparators[0])
        for other in _COMPARISONS.get(sign.strip(), ()):
            yield text.changed("comparison", node.lineno, first, last, f" {other} ")
    elif isinstance(node, ast.BinOp):
        first, last, sign = text.between(node.left, node.right)
        bare = sign.strip()
        if bare in _OPERATORS:  # otherwise a bracket stands in between
            for other in _OPERATORS[bare]:
                yield text.changed("operator", node.lineno, first, last, f" {other} ")
            if not isinstance(node.left, ast.BinOp) and not isinstance(node.right, ast.BinOp):
                yield text.replaced("order", node, f"{text.of(node.right)} {bare} {text.of(node.left)}")
    elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
        first, last, sign = text.between(*node.values)
        yield text.changed("logic", node.lineno, first, last, " or " if "and" in sign else " and ")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield text.replaced("condition", node, text.of(node.operand))
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield text.replaced("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            yield text.replaced("off by one", node, str(node.value + 1))
            if node.value > 0:
                yield text.replaced("off by one", node, str(node.value - 1))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        end = node.args[-1]
        if isinstance(end, ast.Name | ast.Call):
            yield text.replaced("off by one", end, f"{text.of(end)} - 1")
            yield text.replaced("off by one", end, f"{text.of(end)} + 1")


def _in_names(node: ast.AST, text: _Text, names: Sequence[str]) -> Iterator[Bug]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        if node.id in _FUNCTIONS:
            yield text.replaced("function", node, _FUNCTIONS[node.id])
        elif node.id in names:
            for other in names:
                if other != node.id:
                    yield text.replaced("variable", node, other)
    elif isinstance(node, ast.Attribute) and node.attr in _FUNCTIONS:
        yield text.replaced("function", node, f"{text.of(node.value)}.{_FUNCTIONS[node.attr]}")


def _in_statement(node: ast.AST, text: _Text) -> Iterator[Bug]:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, int):
        if not isinstance(node.value.value, bool):
            for value in sorted({0, 1, 2} - {node.value.value}):
                yield text.replaced("initial value", node.value, str(value))
    elif isinstance(node, ast.AugAssign):
        first, last, sign = text.between(node.target, node.value)
        for other in _ASSIGNMENTS.get(sign.strip(), ()):
            yield text.changed("operator", node.lineno, first, last, f" {other} ")
    elif isinstance(node, ast.If):
        yield from _in_branch(node, text)
    for block in (getattr(node, name, None) for name in ("body", "orelse")):
        if isinstance(block, list):
            yield from _in_block(block, text)


def _in_branch(node: ast.If, text: _Text) -> Iterator[Bug]:
    if not isinstance(node.test, ast.BoolOp | ast.UnaryOp):
        yield text.replaced("condition", node.test, f"not {text.of(node.test)}")
    if len(node.body) == 1 == len(node.orelse):
        one, other = node.body[0].lineno - 1, node.orelse[0].lineno - 1
        middle = text.lines[one + 1 : other]
        yield Bug("branches", one, other + 1, (text.lines[other], *middle, text.lines[one]))


def _in_block(block: Sequence[ast.stmt], text: _Text) -> Iterator[Bug]:
    for place, statement in enumerate(block):
        line = statement.lineno - 1
        if isinstance(statement, ast.Assign | ast.AugAssign | ast.Expr) and len(block) > 1:
            yield Bug("missing line", line, line + 1, ())
        if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return) and len(block) > 1:
            yield Bug("missing case", line, statement.end_lineno or statement.lineno, ())
        if isinstance(statement, ast.Return | ast.Assign | ast.AugAssign) and place and _opens_block(block[place - 1]):
            yield Bug("indentation", line, line + 1, (_STEP + text.lines[line],))


def _opens_block(statement: ast.stmt) -> bool:
    """Whether a line behind a statement can be taken for part of it, if it is indented too far."""
    return isinstance(statement, ast.For | ast.While | ast.If)
