"""Programs run by a service over HTTP, so that neither the work nor the risk is on this machine.

The service speaks the API of SandboxFusion (github.com/bytedance/SandboxFusion, ``sandbox/server/sandbox_api.py``:
``POST /run_code``). How well it isolates is the service's own affair; some start with no isolation at all unless they
are told otherwise. What comes back is a text and is bounded here like any other output.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Any

import httpx

from rehearsal import usage
from rehearsal.errors import SandboxError
from rehearsal.sandbox.limits import MIB, Limits, Outcome, ProgramResult

_BUSY = (429, 502, 503, 504)
_SECONDS_OF_GRACE = 10.0


class RemoteSandbox:
    """Runs programs as :func:`rehearsal.sandbox.run_program` does. Thread-safe. Close it after use.

    Of the limits, the service is told ``seconds`` and ``memory_bytes``; ``output_bytes`` is applied to what it answers;
    the others are the service's own.

    Args:
        url: of the service, without ``/run_code``.
        limits: of each program.
        headers: sent with each request, such as one with a key.
        attempts: how often a program is sent to a service that cannot be reached or is busy.
        wait: seconds before the second attempt; twice as long before each further one.

    Raises:
        SandboxError: if the URL is no http or https one.
    """

    isolation = "remote"

    def __init__(
        self, url: str, *, limits: Limits | None = None, headers: Mapping[str, str] | None = None, attempts: int = 4,
        wait: float = 0.5,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise SandboxError(f"The address of a sandbox service begins with http:// or https://, not {url!r}.")
        self.limits = limits or Limits()
        self._url = f"{url.rstrip('/')}/run_code"
        self._attempts, self._wait = max(1, attempts), wait
        self._client = httpx.Client(headers=dict(headers or {}))

    def run_program(
        self, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
        limits: Limits | None = None,
    ) -> ProgramResult:  # fmt: skip
        """Run a Python program.

        Raises:
            SandboxError: if the service cannot be reached, refuses, or says something else than its API has.
        """
        limits = limits or self.limits
        contents = {name: c.encode() if isinstance(c, str) else c for name, c in (files or {}).items()}
        request = {
            "code": source,
            "language": "python",
            "stdin": stdin,
            "run_timeout": limits.seconds,
            "memory_limit_MB": max(1, limits.memory_bytes // MIB),
            "files": {name: base64.b64encode(content).decode("ascii") for name, content in contents.items()},
        }
        begun = time.monotonic()
        usage.count({usage.SANDBOX + self.isolation: 1})
        said = self._post(request, limits.seconds + _SECONDS_OF_GRACE)
        seconds = time.monotonic() - begun
        if said.get("status") == "SandboxError":
            raise SandboxError(f"The sandbox service failed: {said.get('message') or 'it does not say why'}.")
        run = said.get("run_result")
        if not isinstance(run, dict) or not isinstance(run.get("status"), str):
            raise SandboxError(f"What {self._url} answers is not the API of SandboxFusion.")
        code = run.get("return_code")
        stdout, cut = _cut(run.get("stdout"), limits.output_bytes)
        stderr, cut_too = _cut(run.get("stderr"), limits.output_bytes)
        return ProgramResult(
            stdout=stdout,
            stderr=stderr,
            outcome=_outcome(run["status"], code, stderr, cut or cut_too),
            exit_status=code if isinstance(code, int) else None,
            seconds=seconds,
            isolation=self.isolation,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> RemoteSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        why = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._wait * 2 ** (attempt - 1))
            try:
                response = self._client.post(self._url, json=request, timeout=seconds)
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            if response.status_code in _BUSY:
                why = f"status {response.status_code}"
                continue
            if not response.is_success:
                raise SandboxError(f"The sandbox service {self._url} refuses with status {response.status_code}.")
            try:
                said = response.json()
            except ValueError:
                said = None
            if not isinstance(said, dict):
                raise SandboxError(f"What {self._url} answers is not the API of SandboxFusion.")
            return said
        raise SandboxError(f"The sandbox service {self._url} does not answer ({why}); is it running?")


def _cut(text: Any, limit: int) -> tuple[str, bool]:
    data = text.encode("utf-8", "replace") if isinstance(text, str) else b""
    return data[:limit].decode("utf-8", "replace"), len(data) > limit


def _outcome(status: str, code: Any, stderr: str, cut: bool) -> Outcome:
    if status == "TimeLimitExceeded":
        return Outcome.TIMEOUT
    if status != "Finished":
        return Outcome.GONE
    if code == 0:
        return Outcome.OUTPUT if cut else Outcome.FINISHED
    if isinstance(code, int) and code < 0:
        return Outcome.KILLED
    last = (stderr.strip().splitlines() or [""])[-1]
    return Outcome.MEMORY if last.startswith("MemoryError") else Outcome.RAISED
