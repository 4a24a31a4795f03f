"""What a program may use, and what became of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from rehearsal.errors import SandboxError

MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What one program, or one interpreter with everything that it starts, may use.

    Attributes:
        seconds: of a program or of each call of an interpreter, by the clock.
        memory_bytes: address space of each process beyond that of a bare interpreter, and memory of all processes
            together, measured five times a second.
        processes: processes and threads at one time.
        file_bytes: size of a file and, where there are namespaces, of all files together.
        files: open files of each process.
        output_bytes: of each of the streams of output; what is beyond is read and dropped.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 * MIB
    processes: int = 32
    file_bytes: int = 64 * MIB
    files: int = 128
    output_bytes: int = 64 * 1024

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise SandboxError(f"A program needs a time limit above 0 seconds, not {self.seconds}.")
        least = {"memory_bytes": MIB, "processes": 1, "file_bytes": 4096, "files": 16, "output_bytes": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise SandboxError(f"The limit {name} is a whole number of at least {bound}, not {value}.")


class Outcome(enum.Enum):
    """How a program or a call ended."""

    FINISHED = "finished"
    """It ran to its end."""
    RAISED = "raised"
    """An exception that nobody caught, or another exit status than 0."""
    TIMEOUT = "timeout"
    """It was ended when its time was over."""
    MEMORY = "memory"
    """It ran out of memory: a MemoryError that nobody caught, or ended because of what all its processes used."""
    PROCESSES = "processes"
    """It was ended because it had more processes than it may."""
    OUTPUT = "output"
    """It ran to its end, and its output was cut at the limit."""
    EXITED = "exited"
    """The process of an interpreter ended itself in the middle of a call."""
    KILLED = "killed"
    """A signal ended it: it crashed, or killed itself."""
    BROKEN = "broken"
    """It broke the pipe to its sandbox."""
    GONE = "gone"
    """The sandbox itself was ended from outside, or does not answer any more: this says nothing about the program."""


@dataclass(frozen=True)
class ProgramResult:
    """What became of a program.

    Attributes:
        stdout, stderr: what it wrote, up to the limit.
        outcome: how it ended.
        exit_status: of its process; negative for a signal, None if it was ended by its limits.
        seconds: by the clock, from the request to the result.
        isolation: the level of isolation in force, by name.
        error: the class of the exception that ended it, if it said so.
    """

    stdout: str
    stderr: str
    outcome: Outcome
    exit_status: int | None
    seconds: float
    isolation: str
    error: str | None = None


@dataclass(frozen=True)
class CallResult:
    """What became of one call of an interpreter.

    Attributes:
        output: what was written to both streams, and the value of a last expression, up to the limit.
        error: the traceback of an exception, or a sentence that says why the call was ended; None if all went well.
        outcome: how it ended.
        seconds: by the clock.
        isolation: the level of isolation in force, by name.
        state_lost: the call began in a new interpreter because the one of the calls before had been ended.
        value: what a called function answered, in plain data (:meth:`Interpreter.call` reads it).
    """

    output: str
    error: str | None
    outcome: Outcome
    seconds: float
    isolation: str
    state_lost: bool = False
    value: Any = None
