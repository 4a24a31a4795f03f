"""A pool that hands out persistent interpreters, one an episode, in milliseconds.

Names live on from one call of an interpreter to the next, as ReTool's do (arXiv:2504.11536). No process serves two
episodes: each interpreter is forked anew from a zygote that has never run any model's code, and when it is given back
everything that it started is ended and its files are gone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from rehearsal import usage
from rehearsal.errors import SandboxError
from rehearsal.sandbox.calls import Answer, Interpreter
from rehearsal.sandbox.cell import Cell, CellGone
from rehearsal.sandbox.inside.framing import Message
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import Limits, ProgramResult
from rehearsal.sandbox.probing import require
from rehearsal.sandbox.program import run_in
from rehearsal.sandbox.zygote import TRIES, Zygote


class _CellInterpreter(Interpreter):
    """One in a cell of a pool."""

    def __init__(self, pool: InterpreterPool, cell: Cell) -> None:
        super().__init__(pool.limits, pool.isolation.value)
        self._pool = pool
        self._cell: Cell | None = cell

    def _asked(self, message: Message, seconds: float, answer: Answer | None) -> Message:
        lost_here = self._cell is None
        usage.count({usage.SANDBOX + self._isolation: 1})
        try:
            if self._cell is None:
                self._cell = self._pool._new_cell()
            said = self._cell.ask(message, seconds, answer)
        except CellGone:
            assert self._cell is not None
            self._drop()
            return {"outcome": "gone", "output": "", "error": None, "lost": lost_here}
        except BaseException:
            self._drop()  # what `answer` raised leaves a call unanswered
            raise
        return {**said, "lost": lost_here or said["lost"]}

    def _drop(self) -> None:
        if self._cell is not None:
            self._cell.close()
        self._cell = None

    def _give_back(self) -> None:
        if self._cell is not None:
            self._cell.close()
        self._pool._given_back()


class InterpreterPool:
    """Hands out interpreters. Thread-safe. Close it after use.

    Args:
        size: how many may be in use at one time; who asks for more waits.
        limits: of each call and each interpreter.
        isolation: the level, or its name; the strongest one there is if None.
        packages: folders of packages that code may import, beside the standard library: they can be read inside.
        preload: modules that are imported once, so that no interpreter waits for them.
        spare: interpreters that are kept ready.
        python: the Python to run inside; this one if None.

    Attributes:
        isolation: the level in force.
        restarts: how often the zygote was found ended from outside, and started anew.

    Raises:
        SandboxError: if the level is not to be had; the message says how to get it.
    """

    def __init__(
        self, size: int = 8, *, limits: Limits | None = None, isolation: Isolation | str | None = None,
        packages: Sequence[str | PathLike[str]] = (), preload: Sequence[str] = (), spare: int = 2,
        python: str | None = None,
    ) -> None:  # fmt: skip
        if size < 1 or spare < 0:
            raise SandboxError(f"A pool has at least 1 interpreter and 0 spare ones, not {size} and {spare}.")
        self.limits = limits or Limits()
        self.isolation = require(isolation, python)
        self.restarts = 0
        self._options: dict[str, Any] = {"packages": packages, "preload": preload, "python": python}
        self._places = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        self._spare: deque[Cell] = deque()
        self._wanted_spare = min(spare, size)
        self._closed = False
        self._zygote = Zygote(self.isolation, **self._options)
        self._fill()

    def take(self, timeout: float | None = None) -> Interpreter:
        """An interpreter that nobody has used.

        Args:
            timeout: seconds to wait for a free place; for ever if None.

        Raises:
            SandboxError: if no place became free, or the pool was closed.
        """
        if not self._places.acquire(timeout=timeout):
            raise SandboxError(f"No interpreter became free in {timeout} seconds; make the pool larger.")
        try:
            return _CellInterpreter(self, self._new_cell())
        except BaseException:
            self._places.release()
            raise

    @contextlib.contextmanager
    def interpreter(self) -> Iterator[Interpreter]:
        """``with pool.interpreter() as it``: one that is given back at the end."""
        with self.take() as taken:
            yield taken

    def run_program(
        self, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
        limits: Limits | None = None,
    ) -> ProgramResult:  # fmt: skip
        """As :func:`rehearsal.sandbox.run_program`, with the packages of this pool and, if None, its limits."""
        zygote = self._running()
        usage.count({usage.SANDBOX + self.isolation.value: 1})
        return run_in(zygote, source, stdin=stdin, files=files, limits=limits or self.limits)

    def close(self) -> None:
        """End every interpreter and the zygote."""
        with self._lock:
            self._closed = True
            while self._spare:
                self._spare.pop().close()
            self._zygote.close()

    def __enter__(self) -> InterpreterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_cell(self) -> Cell:
        for tries_left in reversed(range(TRIES)):
            zygote = self._running()
            with self._lock:
                try:
                    cell = self._live_spare() or self._started()
                except SandboxError:
                    if self._closed or zygote.alive or not tries_left:
                        raise
                    continue  # it ended this very moment
                self._fill()
                return cell
        raise AssertionError("unreachable: the last try returns or raises")

    def _live_spare(self) -> Cell | None:
        while self._spare:
            cell = self._spare.popleft()
            if cell.alive:
                return cell
            cell.close()
        return None

    def _running(self) -> Zygote:
        """The zygote; a new one if it was ended from outside."""
        with self._lock:
            if self._closed:
                raise SandboxError("The pool of interpreters was closed.")
            if not self._zygote.alive:
                self.restarts += 1
                while self._spare:
                    self._spare.pop().close()
                self._zygote.close()
                self._zygote = Zygote(self.isolation, **self._options)
                self._fill()
            return self._zygote

    def _fill(self) -> None:
        with contextlib.suppress(SandboxError):  # the zygote has ended, which is found out when one is needed
            while len(self._spare) < self._wanted_spare:
                self._spare.append(self._started())

    def _started(self) -> Cell:
        cell = Cell(self._zygote, self.limits)
        with contextlib.suppress(CellGone):  # found out when it is used
            cell.send({"do": "start"})
        return cell

    def _given_back(self) -> None:
        self._places.release()
