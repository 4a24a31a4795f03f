"""Python source as a tree, from any thread."""

from __future__ import annotations

import ast
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rehearsal.agents.toolkit.calculator import calculate
from rehearsal.parsing import parse_python


def failing(times: int) -> Callable[..., Any]:
    """A parser as that of some versions of Python, which mistakes another thread's depth for its own now and then."""
    left = [times]
    parse = ast.parse

    def unlucky(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise SystemError("AST constructor recursion depth mismatch (before=60, after=42)")
        return parse(*args, **kwargs)

    return unlucky


def test_another_threads_depth_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ast, "parse", failing(2))
    assert calculate("2 * (3 + 4)") == 14
    monkeypatch.setattr(ast, "parse", failing(100))
    with pytest.raises(SystemError):
        parse_python("1")


def test_many_threads() -> None:
    lines = ["+".join(["(1)"] * count) for count in range(1, 120)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(calculate, lines * 5)) == list(range(1, 120)) * 5


def test_what_is_no_python_raises_what_it_raised() -> None:
    assert isinstance(parse_python("a = 1"), ast.Module)
    assert isinstance(parse_python("1 + 1", "eval"), ast.Expression)
    for source in ("1 +", "def f(:"):
        with pytest.raises(SyntaxError):
            parse_python(source)
    # A SyntaxError or a ValueError, by the version of Python.
    with pytest.raises((SyntaxError, ValueError), match="null"):
        parse_python("1\0")


def test_what_is_doubtful_is_not_told_to_the_terminal(recwarn: pytest.WarningsRecorder) -> None:
    assert ast.unparse(parse_python("2and 3", "eval")) == "2 and 3"
    assert not recwarn.list
