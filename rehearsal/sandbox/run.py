"""Running a program once, on a zygote that is kept for the next."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Mapping

from rehearsal import usage
from rehearsal.errors import SandboxError
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import Limits, ProgramResult
from rehearsal.sandbox.probing import require
from rehearsal.sandbox.program import run_in
from rehearsal.sandbox.zygote import TRIES, Zygote

_lock = threading.Lock()
_zygotes: dict[tuple[Isolation, str | None], Zygote] = {}


def run_program(
    source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None, limits: Limits | None = None,
    isolation: Isolation | str | None = None, python: str | None = None,
) -> ProgramResult:  # fmt: skip
    """Run a Python program that is not to be trusted, in a fresh process and an empty folder. Thread-safe.

    Args:
        source: of the program.
        stdin: what it reads.
        files: to be found in its folder, by relative path.
        limits: what it may use.
        isolation: the level, or its name; the strongest one there is if None.
        python: the Python to run inside; this one if None.

    Returns:
        what became of it. A program that fails, in whatever way, is a result and no error.

    Raises:
        SandboxError: if the level is not to be had, or a file lies elsewhere than in the program's folder.
    """
    level = require(isolation, python)
    for tries_left in reversed(range(TRIES)):
        with _lock:
            zygote = _zygotes.get((level, python))
            if zygote is None or not zygote.alive:
                if zygote is not None:
                    zygote.close()
                zygote = _zygotes[level, python] = Zygote(level, python=python)
        usage.count({usage.SANDBOX + level.value: 1})
        try:
            return run_in(zygote, source, stdin=stdin, files=files, limits=limits)
        except SandboxError:
            if zygote.alive or not tries_left:
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def close_all() -> None:
    """End the zygotes that :func:`run_program` keeps. It is called when this process ends."""
    with _lock:
        while _zygotes:
            _zygotes.popitem()[1].close()


def _forget_in_child() -> None:
    """A fork of this process must not end what belongs to its parent."""
    _zygotes.clear()


atexit.register(close_all)
with contextlib.suppress(AttributeError):
    os.register_at_fork(after_in_child=_forget_in_child)
