"""Interpreters as their users see them, wherever they run."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rehearsal.errors import SandboxError
from rehearsal.sandbox.inside import plain
from rehearsal.sandbox.inside.framing import Message
from rehearsal.sandbox.limits import CallResult, Limits, Outcome

Answer = Callable[[str], str]
"""Answers a question that code inside asks with ``host.ask(text)``."""


class Interpreter(ABC):
    """One interpreter, handed out by :class:`rehearsal.sandbox.InterpreterPool` or
    :class:`rehearsal.sandbox.RemoteSandbox`. Thread-safe: calls wait for each other.

    A call that goes beyond its limits ends the interpreter with everything in it but its files; the next call begins in
    a new one and says so. So does one after the end of the whole sandbox from outside, which also loses the files. At a
    service files are lost in both cases.

    Attributes:
        calls: how many calls there were.
        losses: how often the state was lost.
    """

    def __init__(self, limits: Limits, isolation: str) -> None:
        self._limits, self._isolation = limits, isolation
        self._lock = threading.Lock()
        self._closed = False
        self.calls = 0
        self.losses = 0

    def run(self, source: str, *, seconds: float | None = None, answer: Answer | None = None) -> CallResult:
        """Run source. The value of a last expression is shown, as at a prompt.

        Args:
            source: Python.
            seconds: time limit of this call; that of the pool if None. A service makes the calls before this one again
                within the same time.
            answer: called when the code calls ``ask(text)`` of the module ``host``, with text that is not to be
                trusted; its answer is returned there.

        Raises:
            SandboxError: if the interpreter or its pool was closed, or the service fails.
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
                self._give_back()

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _asked(self, message: Message, seconds: float, answer: Answer | None) -> Message:
        """What a call came to: ``outcome``, ``output``, ``lost`` (it began without what was there before), ``error``,
        ``value`` where there is one, and ``why`` where more is known of an end than the outcome says."""

    @abstractmethod
    def _give_back(self) -> None:
        """End everything in it."""

    def _request(self, message: Message, seconds: float | None, answer: Answer | None) -> CallResult:
        with self._lock:
            if self._closed:
                raise SandboxError("This interpreter was given back; take another one from the pool.")
            begun = time.monotonic()
            self.calls += 1
            said = self._asked(message, self._limits.seconds if seconds is None else seconds, answer)
            self.losses += said["lost"]
            outcome = Outcome(said["outcome"])
            error = said["error"] if outcome in (Outcome.RAISED, Outcome.MEMORY) else said.get("why")
            return CallResult(
                output=said["output"],
                error=error or _SENTENCES.get(outcome),
                outcome=outcome,
                seconds=time.monotonic() - begun,
                isolation=self._isolation,
                state_lost=said["lost"],
                value=said.get("value"),
            )


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
