"""Programs that are run once: source, standard input and files in; output and how it ended out."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Protocol

from rehearsal.errors import SandboxError
from rehearsal.sandbox.cell import Cell, CellGone
from rehearsal.sandbox.limits import Limits, Outcome, ProgramResult
from rehearsal.sandbox.zygote import Zygote


class ProgramRunner(Protocol):
    """What runs programs: a pool of interpreters, or a service."""

    def run_program(
        self, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
        limits: Limits | None = None,
    ) -> ProgramResult:  # fmt: skip
        """Run a Python program that is not to be trusted."""
        ...


def run_in(
    zygote: Zygote, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
) -> ProgramResult:  # fmt: skip
    """As :func:`rehearsal.sandbox.run_program`, in a cell of a zygote that runs already."""
    limits = limits or Limits()
    coded = _checked(files or {}, limits)
    begun = time.monotonic()
    cell = Cell(zygote, limits)
    try:
        message = {"do": "program", "source": source, "stdin": stdin, "files": coded}
        said = cell.ask(message, limits.seconds)
    except CellGone:
        said = {"outcome": "gone", "output": "", "errors": "", "status": None, "error": None}
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
