"""The host's side of running programs: interpreters that are used again, and what programs answered, compared here."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from rehearsal.environments.repair import inside
from rehearsal.sandbox import CallResult, Interpreter, InterpreterPool, Limits, Outcome, RemoteSandbox, service_at
from rehearsal.sandbox.inside import plain

_INSIDE = Path(inside.__file__).read_text(encoding="utf-8")
_LINES = 2_000
"""Lines that one call may run. The programs of tasks take some hundred at most."""
_CPU_SECONDS, _SECONDS = 1.0, 4.0
"""Of processor and clock, for all calls of a program; what counting lines does not see, such as ``10 ** 10 ** 9``."""
_LIMITS = Limits(seconds=8.0, memory_bytes=64 << 20, processes=8, output_bytes=1 << 16)
_KEPT = 4096
"""Runs that are remembered: the episodes of a group begin alike, and often make the same edit."""

Arguments = tuple[Any, ...]


class Answer(NamedTuple):
    """What a function said to a call.

    Attributes:
        text: the value as Python writes it, or what happened in place of a value.
        is_value: whether there is one.
    """

    text: str
    is_value: bool = True


class Run(NamedTuple):
    """What a program answered.

    Attributes:
        answers: one for each call.
        broken: why nothing could be called; "" if it could.
    """

    answers: tuple[Answer, ...]
    broken: str = ""


class Where(NamedTuple):
    """Where programs that are not to be trusted run.

    Attributes:
        isolation: level of the own sandbox; the strongest there is if None.
        url: of a service in its place.
        api_key_env: name of the environment variable with the service's key.
    """

    isolation: str | None = None
    url: str | None = None
    api_key_env: str | None = None

    def service(self) -> RemoteSandbox | None:
        """A new connection to the service; None if there is none.

        Raises:
            SandboxError: if it cannot be one.
        """
        return service_at(self.url, self.api_key_env, limits=_LIMITS, isolation=self.isolation)


def run_own(function: str, program: str, calls: Sequence[Arguments]) -> Run:
    """What a program of our own making answers. It runs in this process, which is many times faster; that it comes to
    an end is seen to by counting lines."""
    return _read(list(inside.answers(function, program, [list(call) for call in calls], _LINES)), len(calls), "")


class ProgramRunner:
    """Runs programs that agents had a hand in, in a few interpreters that are used again. Thread-safe.
    Close it after use.

    Args:
        where: level of the sandbox, or the service in its place; the strongest level there is if None.
        interpreters: how many programs run at one time.

    Raises:
        SandboxError: if the level is not to be had, or the service is none.
    """

    def __init__(self, where: Where | None = None, interpreters: int | None = None) -> None:
        where = where or Where()
        count = interpreters or max(2, min(8, os.cpu_count() or 2))
        service = where.service()
        self._pool = service or InterpreterPool(count, limits=_LIMITS, isolation=where.isolation, spare=0)
        # One at a service would run every program before it again.
        self._used_again = service is None
        self._places = threading.BoundedSemaphore(count)
        self._idle: deque[Interpreter] = deque()
        self._known: OrderedDict[tuple[str, str, str], Run] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, function: str, program: str, calls: Sequence[Arguments]) -> Run:
        """What a program answers. Whatever it does, there is an answer.

        Raises:
            SandboxError: if the sandbox does not work.
        """

        key = (function, program, repr(calls))
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        asked = [function, program, [list(call) for call in calls], _LINES, _CPU_SECONDS, _SECONDS]
        # Somebody else may have ended the sandbox the first time.
        found = self._tried(asked) or self._tried(asked)
        if found is None:
            return Run((Answer("the program ended the sandbox", False),) * len(calls))
        missing = "no end" if found["late"] or found["spent"] else "the program ended itself"
        run = _read(found["answers"], len(calls), missing)
        if not found["late"]:  # by the clock, and the machine may have been busy
            self._remember(key, run)
        return run

    def close(self) -> None:
        """End the interpreters."""
        self._pool.close()

    def _remember(self, key: tuple[str, str, str], run: Run) -> None:
        with self._lock:
            self._known[key] = run
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)

    def _tried(self, asked: list[Any]) -> dict[str, Any] | None:
        """What :func:`inside.trial` gives; None if its interpreter did not survive, or was no good."""
        with self._places:
            try:
                interpreter = self._idle.pop()
            except IndexError:
                interpreter = self._pool.take()
                interpreter.run(_INSIDE)
            found = None
            try:
                found = _result(interpreter.call("trial", asked))
            finally:
                if found is None or not self._used_again:
                    interpreter.close()
                else:
                    self._idle.append(interpreter)
            return found


def _result(said: CallResult) -> dict[str, Any] | None:
    if said.outcome not in (Outcome.FINISHED, Outcome.OUTPUT) or not isinstance(said.value, dict):
        return None
    result = said.value.get("result")
    if not isinstance(result, dict) or not {"answers", "late", "spent"} <= result.keys():
        return None
    return result if isinstance(result["answers"], list) else None


def _read(answers: Sequence[Any], count: int, missing: str) -> Run:
    """Answers as they came; what cannot be read counts as missing, and so does everything behind it."""
    read: list[Answer] = []
    with contextlib.suppress(ValueError, TypeError, KeyError, plain.PlainError, RecursionError):
        for answer in answers[:count]:
            said = json.loads(answer)
            if "broken" in said:
                told = str(said["broken"])
                return Run((Answer(told, False),) * count, told)
            if "value" in said:
                read.append(Answer(repr(plain.decode(said["value"]))))
            else:
                read.append(Answer(str(said["raised"]), False))
    read += [Answer(missing, False)] * (count - len(read))
    return Run(tuple(read))


# --- one for all environments of this process -------------------------------------------------------------------------

_lock = threading.Lock()
_runners: dict[Where, ProgramRunner] = {}
_users: dict[Where, WeakSet[Any]] = {}


def shared_runner(where: Where, user: object) -> ProgramRunner:
    """The runner of this process for a level of isolation or a service. It stays until all its users have left or are
    gone.

    A runner keeps nothing of a program, so there need be no more interpreters than processors, however many
    environments there are.

    Raises:
        SandboxError: if the level is not to be had.
    """
    with _lock:
        if where not in _runners:
            _runners[where] = ProgramRunner(where)
            _users[where] = WeakSet()
        _users[where].add(user)
        return _runners[where]


def leave(where: Where, user: object) -> None:
    """Say that a user needs its runner no more."""
    with _lock:
        users = _users.get(where, WeakSet())
        users.discard(user)
        if not users and where in _runners:
            _runners.pop(where).close()


def close_all() -> None:
    """Close the runners of this process. It is called when the process ends."""
    with _lock:
        while _runners:
            _runners.popitem()[1].close()


def _forget_in_child() -> None:
    """A fork of this process must not talk to interpreters that belong to its parent."""
    global _lock
    _lock = threading.Lock()
    _runners.clear()
    _users.clear()


atexit.register(close_all)
with contextlib.suppress(AttributeError):
    os.register_at_fork(after_in_child=_forget_in_child)
