"""Persistent interpreters, one an episode, and a pool that hands them out in milliseconds.

Names live on from one call of an interpreter to the next, as ReTool's do (arXiv:2504.11536). No process serves two
episodes: each interpreter is forked anew from a zygote that has never run any model's code, and when it is given back
everything that it started is ended and its files are gone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from rehearsal import usage
from rehearsal.errors import SandboxError
from rehearsal.sandbox.cell import Answer, Cell, CellGone
from rehearsal.sandbox.inside import plain
from rehearsal.sandbox.inside.framing import Message
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import CallResult, Limits, Outcome, ProgramResult
from rehearsal.sandbox.probing import require
from rehearsal.sandbox.program import run_in
from rehearsal.sandbox.zygote import TRIES, Zygote


class Interpreter:
    """One interpreter, handed out by :class:`InterpreterPool`. Thread-safe: calls wait for each other.

    A call that goes beyond its limits ends the interpreter with everything in it but its files; the next call begins in
    a new one and says so. So does one after the end of the whole sandbox from outside, which also loses the files.

    Attributes:
        calls: how many calls there were.
        losses: how often the state was lost.
    """

    def __init__(self, pool: InterpreterPool, cell: Cell) -> None:
        self._pool = pool
        self._cell: Cell | None = cell
        self._lock = threading.Lock()
        self._closed = False
        self.calls = 0
        self.losses = 0

    def run(self, source: str, *, seconds: float | None = None, answer: Answer | None = None) -> CallResult:
        """Run source. The value of a last expression is shown, as at a prompt.

        Args:
            source: Python.
            seconds: time limit of this call; that of the pool if None.
            answer: called when the code calls ``ask(text)`` of the module ``host``, with text that is not to be
                trusted; its answer is returned there.

        Raises:
            SandboxError: if the interpreter or its pool was closed.
        """
        return self._request({"do": "run", "source": source}, seconds, answer)

    def call(
        self, function: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None, *,
        seconds: float | None = None, answer: Answer | None = None,
    ) -> CallResult:  # fmt: skip
        """Call a function that an earlier call defined. ``value`` of the result is what it says in plain data.

        It is a dictionary: with ``result`` and ``arguments`` (the positional ones, then the named ones, as the function
        left them), or with ``raised``, ``said`` and ``error`` (class, message and traceback of an exception), or with
        ``unusable`` (why the result is no plain data); None if the call did not come to its end.

        Raises:
            SandboxError: if an argument is no plain data, or the interpreter was closed.
        """
        try:
            coded = plain.encode((list(arguments), dict(named or {})))
        except plain.PlainError as error:
            raise SandboxError(f"Only plain data can be given to a function in a sandbox, not {error}.") from error
        result = self._request({"do": "call", "function": function, "arguments": coded}, seconds, answer)
        return CallResult(**{**result.__dict__, "value": _read(result.value)})

    def close(self) -> None:
        """Give it back: everything in it ends."""
        with self._lock:
            if not self._closed:
                self._closed = True
                if self._cell is not None:
                    self._cell.close()
                self._pool._given_back()

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, message: Message, seconds: float | None, answer: Answer | None) -> CallResult:
        with self._lock:
            if self._closed:
                raise SandboxError("This interpreter was given back; take another one from the pool.")
            limits = self._pool.limits
            seconds = limits.seconds if seconds is None else seconds
            begun = time.monotonic()
            lost_here = self._cell is None
            self.calls += 1
            usage.count({usage.SANDBOX + self._pool.isolation.value: 1})
            try:
                if self._cell is None:
                    self._cell = self._pool._new_cell()
                said = self._cell.ask(message, seconds, answer)
            except CellGone:
                assert self._cell is not None
                self._drop()
                return self._result({"outcome": "gone", "output": "", "error": None}, begun, lost_here)
            except BaseException:
                self._drop()  # what `answer` raised leaves a call unanswered
                raise
            return self._result(said, begun, lost_here or said["lost"])

    def _drop(self) -> None:
        if self._cell is not None:
            self._cell.close()
        self._cell = None

    def _result(self, said: Message, begun: float, lost: bool) -> CallResult:
        outcome = Outcome(said["outcome"])
        error = said["error"] if outcome in (Outcome.RAISED, Outcome.MEMORY) else None
        self.losses += lost
        return CallResult(
            output=said["output"],
            error=error or _SENTENCES.get(outcome),
            outcome=outcome,
            seconds=time.monotonic() - begun,
            isolation=self._pool.isolation.value,
            state_lost=lost,
            value=said.get("value"),
        )


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
            return Interpreter(self, self._new_cell())
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


def _read(value: Any) -> dict[str, Any] | None:
    """What a guest says of a function's result; anything else than the known forms is nothing."""
    if not isinstance(value, dict):
        return None
    if {"result", "arguments"} <= value.keys():
        try:
            return {"result": plain.decode(value["result"]), "arguments": plain.decode(value["arguments"])}
        except plain.PlainError as error:
            return {"unusable": str(error)}
    if "raised" in value:
        return {key: str(value.get(key, "")) for key in ("raised", "said", "error")}
    return {"unusable": str(value.get("unusable", "nothing"))}


_SENTENCES = {
    Outcome.TIMEOUT: "The call was ended because its time was over; all variables are lost.",
    Outcome.MEMORY: "The call was ended because it used too much memory; all variables are lost.",
    Outcome.PROCESSES: "The call was ended because it had too many processes; all variables are lost.",
    Outcome.EXITED: "The interpreter ended itself; all variables are lost.",
    Outcome.KILLED: "The interpreter crashed or was killed; all variables are lost.",
    Outcome.BROKEN: "The interpreter stopped answering and was ended; all variables are lost.",
    Outcome.GONE: "The sandbox was ended from outside; all variables are lost.",
}
