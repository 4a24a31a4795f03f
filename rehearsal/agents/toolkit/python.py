"""A Python interpreter for each episode, in a sandbox."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.tools import Tool, ToolFailure, tool_from
from rehearsal.errors import SandboxError
from rehearsal.sandbox import CallResult, Interpreter, InterpreterPool, Limits, RemoteSandbox, service_at

_GRACE = 10.0
"""Seconds beyond those of a call: the sandbox keeps the time, and starting an interpreter takes some too."""


class Python(ToolSource):
    """The tool ``python(code)``: what it defines lives on until the episode is over, as in ReTool (arXiv:2504.11536).

    An episode gets an interpreter with its first call, so those that never call take no place. No process serves two
    episodes.

    Args:
        isolation: level of the sandbox, see :class:`rehearsal.sandbox.Isolation`; the strongest there is if left out.
        seconds: that a call may take.
        memory_mib: of an interpreter, in MiB.
        interpreters: how many there may be at one time; further episodes wait for one.
        packages: folders of packages that code may import, beside the standard library.
        preload: modules that are imported once for all episodes.
        url: of a service that takes the sandbox's place, see :class:`rehearsal.sandbox.RemoteSandbox`. It makes the
            earlier calls of an episode again with each new one, and gives each episode its interpreter at once.
        api_key_env: name of the environment variable with the service's key.

    Raises:
        SandboxError: if the level is not to be had, a limit cannot be used, the service is none, or options of the own
            sandbox stand beside it.
    """

    def __init__(
        self, isolation: str | None = None, seconds: float = 5.0, memory_mib: int = 256, interpreters: int = 256,
        packages: Sequence[str] = (), preload: Sequence[str] = (), url: str | None = None,
        api_key_env: str | None = None,
    ) -> None:  # fmt: skip
        limits = Limits(seconds=seconds, memory_bytes=memory_mib << 20)
        own: dict[str, Any] = {"isolation": isolation, "packages": packages, "preload": preload}
        service = service_at(url, api_key_env, limits=limits, **own)
        self.pool: InterpreterPool | RemoteSandbox = service or InterpreterPool(interpreters, limits=limits, **own)

    def open(self) -> Sequence[Tool]:
        episode = _Episode(self.pool)
        seconds = self.pool.limits.seconds + _GRACE
        return [replace(tool_from(episode.python, timeout=seconds), close=episode.close)]

    def facts(self) -> Mapping[str, str]:
        level = self.pool.isolation
        return {"sandbox": level if isinstance(level, str) else level.value}

    def close(self) -> None:
        self.pool.close()


class _Episode:
    """The interpreter of one episode, from its first call on."""

    def __init__(self, pool: InterpreterPool | RemoteSandbox) -> None:
        self._pool = pool
        self._interpreter: Interpreter | None = None
        self._closed = False
        self._lock = threading.Lock()

    def python(self, code: str) -> str:
        """Runs Python and gives what it prints and the value of its last line. Variables stay until the end.

        Args:
            code: the program
        """
        with self._lock:
            if self._closed:
                raise ToolFailure("the episode is over")
            if self._interpreter is None:
                self._interpreter = self._taken()
            result = self._interpreter.run(code)
        if result.error:
            raise ToolFailure(_told(result))
        return _told(result)

    def _taken(self) -> Interpreter:
        try:
            return self._pool.take(timeout=_GRACE)
        except SandboxError as error:
            raise SandboxError(
                f"{error} There are as many as the option interpreters of the tool python says, and each episode that "
                "has called it holds one to its end."
            ) from error

    def close(self) -> None:
        # A call that was left behind holds the lock until the sandbox ends it, and nobody may wait for that here.
        threading.Thread(target=self._close, daemon=True, name="rehearsal-python").start()

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            if self._interpreter is not None:
                self._interpreter.close()


def _told(result: CallResult) -> str:
    lost = "The variables of earlier calls are lost." if result.state_lost else ""
    return "\n".join(part.rstrip() for part in (lost, result.output, result.error or "") if part and part.strip())
