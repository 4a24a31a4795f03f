"""Python source as a tree, from any thread."""

from __future__ import annotations

import ast
import threading
import warnings
from typing import Any, Literal, overload

ALONE = threading.RLock()
"""Held while source is parsed. In some versions of Python (3.11 among them) two threads that parse at the same time
take each other's depth of recursion for their own, and sound source raises SystemError (python/cpython, gh-106905)."""

_TRIES = 3


@overload
def parse_python(source: str, mode: Literal["exec"] = "exec") -> ast.Module: ...
@overload
def parse_python(source: str, mode: Literal["eval"]) -> ast.Expression: ...
def parse_python(source: str, mode: Literal["exec", "eval"] = "exec") -> Any:
    """As ``ast.parse``, whatever other threads do.

    Raises:
        SyntaxError: for what is not Python.
        ValueError, RecursionError, MemoryError: as ``ast.parse`` does, for null characters, nesting and size.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            # What is doubtful in what an agent wrote, such as "2and 3", is nothing to tell the user's terminal.
            with ALONE, warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                return ast.parse(source, mode=mode)
        except SystemError:  # somebody who does not know of the lock was parsing too
            if not tries_left:
                raise
    raise AssertionError("unreachable: the last try returns or raises")
