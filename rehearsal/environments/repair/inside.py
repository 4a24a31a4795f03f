"""Runs programs against inputs.

The text of this module is sent into an interpreter of :mod:`rehearsal.sandbox`, so it uses the standard library and
:mod:`rehearsal.sandbox.inside` alone. There a program that an agent had a hand in runs in a fork (:func:`trial`), which
can start no process, write no file and reach no pipe but its own, and is gone afterwards: whatever it does to builtins,
modules or itself, the next program does not meet it. Only arguments get in, and values out: what a function should have
given is known to the host alone.

Programs of our own making, which do nothing but count and compare, are run by :func:`answers` wherever one is.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rehearsal.sandbox.inside import plain

_FILE = "program"
_LONGEST_SAID = 100
"""Characters of the message of an exception."""
_LARGEST_VALUE = 2_000
"""Characters of a coded value. Functions of tasks give small ones."""
_MOST_BYTES = 1 << 18
"""Of all that a program answers."""


class EndlessError(BaseException):
    """A program that ran more lines than it may. Programs that catch exceptions do not catch this one."""


def trial(
    function: str, program: str, calls: list[list[Any]], lines: int, cpu_seconds: float, seconds: float
) -> dict[str, Any]:
    """What a program that is not to be trusted answers, run in a fork: the answers that came, and whether it was ended
    before it was done, by the clock ("late") or because its processor time was spent."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _shut_in(writer, cpu_seconds)
            for answer in answers(function, program, calls, lines):
                os.write(writer, answer.encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        said, late = _read(reader, seconds)
    finally:
        os.close(reader)
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    spent = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
    return {"answers": said.decode("utf-8", "replace").split("\n")[:-1], "late": late, "spent": spent}


def _shut_in(writer: int, cpu_seconds: float) -> None:
    """Take from this fork what a program could do harm with, to the process that it comes from above all."""
    os.closerange(0, writer)
    os.closerange(writer + 1, 1024)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Processor time, so that a busy machine does not change what becomes of a program; the clock comes later.
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def _read(reader: int, seconds: float) -> tuple[bytes, bool]:
    """All that comes until the other end is closed, and whether that took too long or was too much."""
    said = b""
    deadline = time.monotonic() + seconds
    while len(said) < _MOST_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return said, True
        piece = os.read(reader, 1 << 16)
        if not piece:
            return said, False
        said += piece
    return said, True


def answers(function: str, program: str, calls: list[list[Any]], lines: int) -> Iterator[str]:
    """What the function of a program says to each call, as JSON; a single answer with "broken" if it cannot be called.

    A call may run so many lines. They are counted, because a limit on time would not be the same on every machine.
    """
    names: dict[str, Any] = {"__name__": _FILE}
    try:
        code = compile(program, _FILE, "exec", dont_inherit=True)
        with _at_most(lines):
            exec(code, names)
    except BaseException as error:
        yield json.dumps({"broken": _said(error)})
        return
    called = names.get(function)
    if called is None:
        yield json.dumps({"broken": f"it does not define {function}"})
        return
    for arguments in calls:
        yield _answer(called, copy.deepcopy(arguments), lines)


def _answer(called: Any, arguments: list[Any], lines: int) -> str:
    try:
        with _at_most(lines):
            value = called(*arguments)
        coded = json.dumps({"value": plain.encode(value)})
    except plain.PlainError as error:
        return json.dumps({"raised": str(error)[:_LONGEST_SAID]})
    except BaseException as error:
        return json.dumps({"raised": _said(error)})
    return coded if len(coded) <= _LARGEST_VALUE else json.dumps({"raised": "a value too large to show"})


@contextlib.contextmanager
def _at_most(lines: int) -> Iterator[None]:
    left, before = lines, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise EndlessError
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _said(error: BaseException) -> str:
    """An exception in a line, with the line of the program that it comes from."""
    if isinstance(error, EndlessError):
        return "no end"
    if isinstance(error, RecursionError):
        return "RecursionError"  # where and in what depends on how deep the stack was before
    try:
        text = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        place = error.lineno if isinstance(error, SyntaxError) else None
        for frame, line in traceback.walk_tb(error.__traceback__):
            place = line if frame.f_code.co_filename == _FILE else place
    except BaseException:
        return "an exception that cannot be shown"
    text = " ".join(text.split()).rstrip(": ")[:_LONGEST_SAID]
    return text if place is None else f"{text} in line {place}"
