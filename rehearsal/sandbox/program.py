"""Programs that are run once: source, standard input and files in; output and how it ended out."""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Protocol

from rehearsal.errors import SandboxError
from rehearsal.sandbox.cell import Cell, CellGone
from rehearsal.sandbox.isolation import Isolation, require
from rehearsal.sandbox.limits import Limits, Outcome, ProgramResult
from rehearsal.sandbox.zygote import Zygote

_lock = threading.Lock()
_zygotes: dict[tuple[Isolation, str | None], Zygote] = {}


class ProgramRunner(Protocol):
    """What runs programs: a pool of interpreters, or a service."""

    def run_program(
        self, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
        limits: Limits | None = None,
    ) -> ProgramResult:  # fmt: skip
        """Run a Python program that is not to be trusted."""
        ...


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
    with _lock:
        zygote = _zygotes.get((level, python))
        if zygote is None or not zygote.alive:
            if zygote is not None:
                zygote.close()
            zygote = _zygotes[level, python] = Zygote(level, python=python)
    return run_in(zygote, source, stdin=stdin, files=files, limits=limits)


def run_in(
    zygote: Zygote, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
) -> ProgramResult:  # fmt: skip
    """As :func:`run_program`, in a cell of a zygote that runs already."""
    limits = limits or Limits()
    coded = _checked(files or {}, limits)
    begun = time.monotonic()
    cell = Cell(zygote, limits)
    try:
        message = {"do": "program", "source": source, "stdin": stdin, "files": coded}
        said = cell.ask(message, limits.seconds)
    except CellGone:
        said = {"outcome": "broken", "output": "", "errors": "", "status": None, "error": None}
    finally:
        cell.close()
    return ProgramResult(
        stdout=said["output"],
        stderr=said["errors"],
        outcome=Outcome(said["outcome"]),
        exit_status=said["status"],
        seconds=time.monotonic() - begun,
        isolation=zygote.isolation.value,
        error=said["error"],
    )


def close_all() -> None:
    """End the zygotes that :func:`run_program` keeps. It is called when this process ends."""
    with _lock:
        while _zygotes:
            _zygotes.popitem()[1].close()


def _forget_in_child() -> None:
    """A fork of this process must not end what belongs to its parent."""
    _zygotes.clear()


def _checked(files: Mapping[str, str | bytes], limits: Limits) -> dict[str, str]:
    coded = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
            raise SandboxError(f"A file of a program has a relative path within the program's folder, not {name!r}.")
        data = content.encode() if isinstance(content, str) else content
        if len(data) > limits.file_bytes:
            raise SandboxError(f"The file {name} has {len(data)} bytes, more than the limit of {limits.file_bytes}.")
        coded[str(path)] = base64.b64encode(data).decode("ascii")
    return coded


atexit.register(close_all)
with contextlib.suppress(AttributeError):
    os.register_at_fork(after_in_child=_forget_in_child)
