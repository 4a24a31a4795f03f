"""Programs with one thing changed, as somebody might get it wrong."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip

_OTHER = """
def _other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, (list, tuple)):
        strange = "?~" if value and isinstance(value[0], str) else 987654321
        return value + type(value)([strange])
    if isinstance(value, dict):
        return {**value, "?~": 1}
    if isinstance(value, set):
        return value | {"?~"}
    return 987654321 if value is None else None
"""
"""Something else of the same type; of None, which has no other, a number."""


def other_returns(function: ast.FunctionDef) -> Iterator[ast.FunctionDef]:
    """The value of the last ``return`` is another one of its type."""
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    last = max(returns, key=lambda node: node.lineno)
    value = last.value
    assert value is not None
    last.value = ast.Call(ast.Name("_other", ast.Load()), [value], [])
    yield function
    last.value = value


def off_by_one(function: ast.FunctionDef) -> Iterator[ast.FunctionDef]:
    """A whole number is one more."""
    for node in _constants(function):
        node.value += 1
        yield function
        node.value -= 1


def other_operators(function: ast.FunctionDef) -> Iterator[ast.FunctionDef]:
    """An operator or comparison is another one."""
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _OPERATORS:
            before = node.op
            node.op = _OPERATORS[type(before)]()  # type: ignore[assignment]
            yield function
            node.op = before
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
            first = node.ops[0]
            node.ops[0] = _OPERATORS[type(first)]()  # type: ignore[call-overload]
            yield function
            node.ops[0] = first


KINDS: dict[str, Callable[[ast.FunctionDef], Iterator[ast.FunctionDef]]] = {
    "return": other_returns, "constant": off_by_one, "operator": other_operators
}  # fmt: skip


def mutants(program: str, entry: str, most: int = 3) -> list[tuple[str, str]]:
    """Kind and source of programs that differ from one in a single place of a function.

    Args:
        program: source with the function in it.
        entry: name of the function.
        most: of each kind, taken evenly from all there are.
    """
    found: list[tuple[str, str]] = []
    for kind, change in KINDS.items():
        tree = ast.parse(program)
        function = next(n for n in reversed(tree.body) if isinstance(n, ast.FunctionDef) and n.name == entry)
        lead = _OTHER if kind == "return" else ""
        made = [lead + ast.unparse(ast.fix_missing_locations(tree)) for _ in change(function)]
        chosen = sorted({round(i * (len(made) - 1) / max(1, most - 1)) for i in range(most)}) if made else []
        found += [(kind, made[place]) for place in chosen]
    return found


def _constants(function: ast.FunctionDef) -> list[ast.Constant]:
    nodes = (node for statement in function.body for node in ast.walk(statement))
    return [node for node in nodes if isinstance(node, ast.Constant) and type(node.value) is int]
