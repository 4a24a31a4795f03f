"""Programs and interpreters at a service over HTTP, so that neither the work nor the risk is on this machine.

The service speaks the API of SandboxFusion (github.com/bytedance/SandboxFusion, ``sandbox/server/sandbox_api.py``:
``POST /run_code``). How well it isolates is the service's own affair; some start with no isolation at all unless they
are told otherwise. What comes back is a text and is bounded here like any other output.

The service keeps nothing from one program to the next, so an interpreter there lives by repetition
(:mod:`rehearsal.sandbox.inside.replay`): with each call all those before it are made again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from rehearsal import usage
from rehearsal.errors import SandboxError
from rehearsal.naming import secret_named
from rehearsal.sandbox.calls import Answer, Interpreter
from rehearsal.sandbox.inside import replay
from rehearsal.sandbox.inside.framing import Message
from rehearsal.sandbox.limits import MIB, Limits, Outcome, ProgramResult

_BUSY = (429, 502, 503, 504)
_SECONDS_OF_GRACE = 10.0
_MOST_QUESTIONS = 1000
"""That one call may ask the host: for each it is made again."""
_WITH_STATE = (Outcome.FINISHED, Outcome.OUTPUT, Outcome.RAISED, Outcome.MEMORY)
_REPLAY_TOO_LONG = (
    "The call was ended because its time was over before it began, as the calls before it were made again; all "
    "variables are lost."
)
_LONGEST_REPORT = 1 << 21
"""Characters of what a program says of its calls; more than services keep of a stream."""

_PACKAGE = "rehearsal.sandbox.inside"
_SOURCES = dict.fromkeys(("rehearsal", "rehearsal.sandbox", _PACKAGE), "") | {
    f"{_PACKAGE}.{name}": Path(replay.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    for name in ("framing", "plain", "guest", "replay")
}
_PROGRAM = """\
import os, sys, types
if os.environ.get("PYTHONHASHSEED") != "{seed}" and os.path.isfile(sys.argv[0]):
    os.environ["PYTHONHASHSEED"] = "{seed}"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.argv])
for name, source in {sources}.items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    exec(compile(source, "<" + name + ">", "exec"), module.__dict__)
    setattr(sys.modules.get(name.rpartition(".")[0], module), name.rpartition(".")[2], module)
sys.modules["{package}.replay"].main({seed})
"""
"""It begins anew with a seed for the order of sets, which would otherwise differ from one repetition to the next."""


class RemoteSandbox:
    """Runs programs as :func:`rehearsal.sandbox.run_program` does, and hands out interpreters as
    :class:`rehearsal.sandbox.InterpreterPool` does, any number of them. Thread-safe. Close it after use.

    Of the limits, the service is told ``seconds`` and ``memory_bytes``; ``output_bytes`` is applied to what it answers;
    the others are the service's own.

    Args:
        url: of the service, without ``/run_code``.
        limits: of each program, and of each call of an interpreter with those before it.
        headers: sent with each request.
        api_key_env: name of the environment variable with the service's key, which is sent as a bearer token.
        attempts: how often a program is sent to a service that cannot be reached or is busy.
        wait: seconds before the second attempt; twice as long before each further one.

    Raises:
        SandboxError: if the URL is no http or https one, or the key is not set.
    """

    isolation = "remote"

    def __init__(
        self, url: str, *, limits: Limits | None = None, headers: Mapping[str, str] | None = None,
        api_key_env: str | None = None, attempts: int = 4, wait: float = 0.5,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise SandboxError(f"The address of a sandbox service begins with http:// or https://, not {url!r}.")
        self.limits = limits or Limits()
        self._url = f"{url.rstrip('/')}/run_code"
        self._attempts, self._wait = max(1, attempts), wait
        sent = dict(headers or {})
        if api_key_env is not None:
            key = secret_named(api_key_env, "the key of the sandbox service", SandboxError)
            sent["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(headers=sent)
        self._lock = threading.Lock()
        self._holds_interpreters = False

    def run_program(
        self, source: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None,
        limits: Limits | None = None,
    ) -> ProgramResult:  # fmt: skip
        """Run a Python program.

        Raises:
            SandboxError: if the service cannot be reached, refuses, or says something else than its API has.
        """
        limits = limits or self.limits
        begun = time.monotonic()
        run = self._run(source, stdin, files, limits)
        seconds = time.monotonic() - begun
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

    def take(self, timeout: float | None = None, *, limits: Limits | None = None) -> Interpreter:
        """An interpreter that nobody has used. There is always one, so nobody waits.

        Args:
            timeout: as a pool has it.
            limits: of its calls; those of the service if None.

        Raises:
            SandboxError: if the service cannot be reached, or has no Python that holds an interpreter.
        """
        with self._lock:
            if not self._holds_interpreters:
                self._look()
                self._holds_interpreters = True
        return _RemoteInterpreter(self, limits or self.limits)

    @contextlib.contextmanager
    def interpreter(self, *, limits: Limits | None = None) -> Iterator[Interpreter]:
        """``with service.interpreter() as it``: one that is given back at the end."""
        with self.take(limits=limits) as taken:
            yield taken

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> RemoteSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self) -> None:
        """Make no call, once: what goes wrong afterwards is the doing of the code."""
        run = self._replay(0, [], replace(self.limits, seconds=_SECONDS_OF_GRACE))
        said = str(run.get("stderr") or "")
        if replay.READY not in said.split("\n"):
            why = (said.strip().splitlines() or [str(run["status"])])[-1][:200]
            raise SandboxError(
                f"The sandbox service cannot hold an interpreter, which takes Python 3.9 or newer: {why}."
            )

    def _replay(self, seed: int, calls: list[Message], limits: Limits) -> dict[str, Any]:
        source = _PROGRAM.format(seed=seed, sources=ascii(_SOURCES), package=_PACKAGE)
        return self._run(source, json.dumps(calls), None, limits)

    def _run(
        self, source: str, stdin: str, files: Mapping[str, str | bytes] | None, limits: Limits
    ) -> dict[str, Any]:  # fmt: skip
        """What the service says of a program: a dictionary with at least the text ``status``."""
        contents = {name: c.encode() if isinstance(c, str) else c for name, c in (files or {}).items()}
        request = {
            "code": source,
            "language": "python",
            "stdin": stdin,
            "run_timeout": limits.seconds,
            "memory_limit_MB": max(1, limits.memory_bytes // MIB),
            "files": {name: base64.b64encode(content).decode("ascii") for name, content in contents.items()},
        }
        usage.count({usage.SANDBOX + self.isolation: 1})
        said = self._post(request, limits.seconds + _SECONDS_OF_GRACE)
        if said.get("status") == "SandboxError":
            raise SandboxError(f"The sandbox service failed: {said.get('message') or 'it does not say why'}.")
        run = said.get("run_result")
        if not isinstance(run, dict) or not isinstance(run.get("status"), str):
            raise SandboxError(f"What {self._url} answers is not the API of SandboxFusion.")
        return run

    def _post(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        if self._client.is_closed:
            raise SandboxError("The connection to the sandbox service was closed.")
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


def service_at(
    url: str | None, api_key_env: str | None = None, *, limits: Limits | None = None, **own: Any
) -> RemoteSandbox | None:  # fmt: skip
    """The service that options name; None where they name none.

    Args:
        url, api_key_env, limits: as :class:`RemoteSandbox` has them.
        own: options of the own sandbox, by name. Beside a service they would do nothing, so they must be empty.

    Raises:
        SandboxError: for a key that is not set or has no service, for options of both, and for a URL that is none.
    """
    if url is None:
        if api_key_env is not None:
            raise SandboxError("The url names the service that runs programs, and a key needs one.")
        return None
    for name, value in own.items():
        if value:
            raise SandboxError(f"The option {name} is of the own sandbox, and with a url a service takes its place.")
    return RemoteSandbox(url, limits=limits, api_key_env=api_key_env)


class _RemoteInterpreter(Interpreter):
    """One at a service: all calls so far, which are made again with each new one."""

    def __init__(self, service: RemoteSandbox, limits: Limits) -> None:
        super().__init__(limits, service.isolation)
        self._service = service
        self._seed = secrets.randbelow(1 << 32)
        self._past: list[Message] = []
        self._lost = False

    def _asked(self, message: Message, seconds: float, answer: Answer | None) -> Message:
        limits = replace(self._limits, seconds=seconds)
        answers: list[tuple[str, Message]] = []
        call = {**message, "n": self.calls, "answers": None if answer is None else answers}
        while True:
            run = self._service._replay(self._seed, [*self._past, call], limits)
            said, begun = _reported(run.get("stderr"))
            # What nobody answers is no question but a forgery.
            if answer is None or said.keys().isdisjoint(("ask", "failed")):
                break
            if "failed" in said or len(answers) == _MOST_QUESTIONS:
                why = said.get("failed", f"it asks more than {_MOST_QUESTIONS} times")
                raise SandboxError(f"Code that asks its host cannot go on at a service: {why}.")
            question = str(said["ask"])
            answers.append((question, {"text": answer(question)}))
        output, cut = _cut(run.get("stdout"), limits.output_bytes)
        found = {"output": output, "lost": self._lost, **_end(said, run, cut)}
        self._lost = Outcome(found["outcome"]) not in _WITH_STATE
        if self._lost and found["outcome"] == Outcome.TIMEOUT and self._past and not begun:
            found["why"] = _REPLAY_TOO_LONG
        self._past = [] if self._lost else [*self._past, call]
        return found

    def _give_back(self) -> None:
        self._past = []


def _cut(text: Any, limit: int) -> tuple[str, bool]:
    data = text.encode("utf-8", "replace") if isinstance(text, str) else b""
    return data[:limit].decode("utf-8", "replace"), len(data) > limit


def _reported(text: Any) -> tuple[Message, bool]:
    """What a program says became of its last call, and whether that had begun. Code can have written it."""
    lines = text[:_LONGEST_REPORT].split("\n") if isinstance(text, str) else []
    for line in reversed(lines):
        if line.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                return dict(json.loads(line)), replay.BEGUN in lines
    return {}, replay.BEGUN in lines


def _end(said: Message, run: Mapping[str, Any], cut: bool) -> Message:
    """How a call ended, by what is said of it; if nothing is, by how its program did."""
    error, kind = said.get("error", 0), said.get("kind", "")
    if error is None:
        return {"outcome": Outcome.OUTPUT if cut else Outcome.FINISHED, "error": None, "value": said.get("value")}
    if isinstance(error, str):
        return {"outcome": Outcome.MEMORY if kind == "MemoryError" else Outcome.RAISED, "error": error}
    outcome = _outcome(run["status"], run.get("return_code"), "", False)
    return {"outcome": Outcome.EXITED if outcome in _WITH_STATE else outcome, "error": None}


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
