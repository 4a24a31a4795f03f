"""Arithmetic that a small model cannot do in its head, and that cannot do anything else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.tools import Tool, ToolFailure, tool_from
from rehearsal.parsing import parse_python

MAX_BITS = 3400
"""Whole numbers have at most so many bits, about 1000 digits: what is larger takes long and says little."""
MAX_CHARACTERS = 500

Number = int | float

_CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e}
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})


class Calculator(ToolSource):
    """One tool, ``calculator(expression)``: numbers, brackets, ``+ - * / // % **`` and the functions abs, ceil, comb,
    cos, exp, factorial, floor, gcd, lcm, log, log10, log2, max, min, round, sin, sqrt, sum and tan."""

    fast = True

    def open(self) -> Sequence[Tool]:
        return [_TOOL]


def calculator(expression: str) -> str:
    """Works out an arithmetic expression, exactly for whole numbers.

    Args:
        expression: such as (17 + 4) * 3 ** 2 or sqrt(2)
    """
    return shown(calculate(expression))


def calculate(expression: str) -> Number:
    """The value of an arithmetic expression. Time and memory are bounded whatever the expression.

    The expression is parsed as Python and its tree is walked; what is not arithmetic is refused. Whole numbers are
    exact; a quotient of whole numbers is one where it can be.

    Raises:
        ToolFailure: with a sentence about what is wrong.
    """
    text = expression.strip().translate(_SPELLINGS)
    if len(text) > MAX_CHARACTERS:
        raise ToolFailure(f"the expression has {len(text)} characters, and {MAX_CHARACTERS} are allowed")
    try:
        return _value(parse_python(text, "eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, ValueError) and not isinstance(error, SyntaxError | UnicodeError):
            raise ToolFailure(f"{error}") from error
        raise ToolFailure("this is no arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ToolFailure("division by zero") from error
    except OverflowError as error:
        raise ToolFailure("the result is too large") from error
    except TypeError as error:
        raise ToolFailure("a function was given what it does not take") from error


def shown(value: Number) -> str:
    """A number as text: whole ones exactly, others with 12 digits."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=bool() | complex()):
            pass
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.BinOp(op=ast.BitXor()):
            raise ToolFailure("a power is written **, not ^")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=[]) if name in _FUNCTIONS:
            raise ToolFailure(f"{name} needs an argument")
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*_numbers(arguments)))
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
            raise ToolFailure(f"there is no {name[:40]}; there are {', '.join([*sorted(_FUNCTIONS), *_CONSTANTS])}")
        case ast.Tuple():
            raise ToolFailure("numbers are written without commas, and one expression at a time")
    raise ToolFailure("only arithmetic with numbers is allowed")


def _numbers(arguments: Sequence[ast.AST]) -> list[Number]:
    found: list[Number] = []
    for argument in arguments:
        inner = argument.elts if isinstance(argument, ast.List | ast.Tuple) else [argument]
        found += [_value(one) for one in inner]
    return found


def _bounded(value: Any) -> Number:
    if isinstance(value, complex):
        raise ToolFailure("the result is no real number")
    if (isinstance(value, int) and value.bit_length() > MAX_BITS) or (isinstance(value, float) and math.isinf(value)):
        raise ToolFailure("the result is too large")
    if isinstance(value, float) and math.isnan(value):
        raise ToolFailure("the result is no number")
    number: Number = value
    return number


def _divided(left: Number, right: Number) -> Number:
    if isinstance(left, int) and isinstance(right, int) and right and left % right == 0:
        return left // right
    return left / right


def _power(base: Number, exponent: Number) -> Any:
    # Before it is computed: the largest of them would fill the memory.
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and abs(exponent) * (int(base).bit_length() - 1) > MAX_BITS:
        raise ToolFailure("the result is too large" if exponent > 0 else "the result is too small")
    return base**exponent


def _whole(name: str, function: Callable[..., int], most: int) -> Callable[..., int]:
    def checked(*values: Number) -> int:
        if not all(isinstance(value, int) and 0 <= value <= most for value in values):
            raise ToolFailure(f"{name} takes whole numbers from 0 to {most}")
        return function(*values)

    return checked


def _rounded(value: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > 300:
        raise ToolFailure("round takes a number of digits from -300 to 300")
    return round(value, digits) if digits else round(value)


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _divided,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "ceil": math.ceil, "comb": _whole("comb", math.comb, 1000), "cos": math.cos, "exp": math.exp,
    "factorial": _whole("factorial", math.factorial, 400), "floor": math.floor,
    "gcd": _whole("gcd", math.gcd, 10**300), "lcm": _whole("lcm", math.lcm, 10**100), "log": math.log,
    "log10": math.log10, "log2": math.log2, "max": lambda *values: max(values), "min": lambda *values: min(values),
    "round": _rounded, "sin": math.sin, "sqrt": math.sqrt, "sum": lambda *values: sum(values), "tan": math.tan,
}  # fmt: skip

_TOOL = tool_from(calculator, fast=True)
