"""A process that verifies, seen from both ends.

It is a fresh interpreter that talks through its standard input and output, so that a user's script is not run again,
whatever it looks like. The number of the item that it works on stands in a file that both ends have mapped: writing
there costs nothing, and it can be read although the process hangs in native code or has died.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from rehearsal import signals, usage
from rehearsal.errors import RewardError
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError, Verifier

FLUSH_EVERY = 0.02
"""Seconds after which results are sent although the chunk is not done."""
_GRACE = 5.0
"""Seconds past its time limit after which a process ends by itself, should its parent be gone."""
_SECONDS_TO_LEAVE = 2.0
_COUNT = struct.Struct("=q")
_MORE_THAN_ANY_ITEM = 1 << 62

Result = Score | Failure


class WorkerEndedError(Exception):
    """The process is gone; the message says how it ended."""


class WorkerProcess:
    """One process with its verifiers, as its parent sees it. Used by one thread at a time.

    Args:
        verifiers: by name; sent to the process, so they must be picklable.
        progress: a file of at least 8 bytes that no other process uses.
        timeout: seconds that one check may take.
        memory: bytes of address space that the process may use; None for no limit.
        start_timeout: seconds that starting and warming up may take.
    """

    def __init__(
        self, verifiers: Mapping[str, Verifier], progress: Path, timeout: float, memory: int | None,
        start_timeout: float,
    ) -> None:  # fmt: skip
        progress.write_bytes(_COUNT.pack(0))
        with progress.open("r+b") as file:
            self._progress = mmap.mmap(file.fileno(), _COUNT.size)
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._ending = threading.Lock()
        self._group_ended = False
        self._start_timeout = start_timeout
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        # Where modules are found comes first: what is sent may need it.
        # With the present folder, where a verifier of the user's own may come from.
        paths = list(dict.fromkeys([*map(os.path.abspath, sys.path), os.getcwd()]))
        with signals.held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}; from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread}, start_new_session=True,
            )  # fmt: skip
        self._input = cast(BinaryIO, self._process.stdin)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="rehearsal-verifier")
        try:
            self._send((str(progress), timeout, memory))
            self._send(dict(verifiers))
            self._listener.start()
        except BaseException:  # nobody else knows of the process
            self.kill()
            raise

    @property
    def begun(self) -> int:
        """How many items of the present chunk it has begun."""
        return int(_COUNT.unpack_from(self._progress)[0])

    def wait_until_ready(self, stop: threading.Event) -> None:
        """Wait for its libraries.

        Args:
            stop: nobody waits for it any more once this is set.

        Raises:
            RewardError: if its verifiers cannot be made there, in its own words.
            WorkerEndedError: if it died, was too slow, or is not wanted any more.
        """
        deadline = time.monotonic() + self._start_timeout
        while True:
            try:
                what, content = self._inbox.get(timeout=0.1)
                break
            except queue.Empty:
                if stop.is_set():
                    raise WorkerEndedError("is not wanted any more") from None
                if time.monotonic() > deadline:
                    raise WorkerEndedError(f"was not ready after {self._start_timeout:g} s") from None
                if self._has_ended():
                    self._end_group()
        if what == "broken":
            raise RewardError(content)
        if what == "ended":
            raise WorkerEndedError(content)

    def send_chunk(self, items: list[bytes]) -> None:
        """Let it check pickled ``(name, completion, task)``."""
        _COUNT.pack_into(self._progress, 0, 0)
        self._send(items)

    def receive(self, timeout: float) -> list[Result]:
        """The next results, in order; an empty list where there are none yet.

        Raises:
            WorkerEndedError: if it is gone.
        """
        try:
            what, content = self._inbox.get(timeout=timeout)
        except queue.Empty:
            if self._has_ended():
                self._end_group()  # what it started may hold the pipe, whose end would then never be read
            return []
        if what == "used":
            usage.count(content)
            return self.receive(timeout)
        if what != "results":
            raise WorkerEndedError(content)
        return cast(list[Result], content)

    def kill(self) -> None:
        """End it now, with all processes that it started."""
        self._end_group()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._input.close()

    def close(self) -> None:
        """Let it read the end of its input and leave; what it started ends too."""
        with contextlib.suppress(OSError):
            self._input.close()
        self._listener.join(_SECONDS_TO_LEAVE)
        self.kill()

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):
            return False
        try:
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, how) is not None
        except ChildProcessError:  # it was fetched
            return True

    def _fetch(self) -> int:
        """Wait for its end and end what it started, which may outlive it and hold the pipe; its exit code."""
        if hasattr(os, "waitid"):
            # Until it is fetched, its number, which is that of its group too, goes to no other process.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._end_group()
        return self._process.wait()

    def _end_group(self) -> None:
        with self._ending:
            if not self._group_ended:
                self._group_ended = True
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, content: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # the listening thread tells that it ended
            pickle.dump(content, self._input, protocol=5)
            self._input.flush()

    def _listen(self) -> None:
        output = cast(BinaryIO, self._process.stdout)
        try:
            while True:
                self._inbox.put(pickle.load(output))
        except (EOFError, OSError):
            code = self._fetch()
            told = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        except Exception as problem:  # nobody may wait for ever for an answer that cannot be read
            told = f"sent what cannot be read ({type(problem).__name__}: {problem})"
        finally:
            output.close()
        self._inbox.put(("ended", told))


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


# --- inside the process -----------------------------------------------------------------------------------------------


def serve() -> None:
    """What the process does: make its verifiers, and check until its input ends."""
    # What a verifier prints must not get between the messages.
    with os.fdopen(os.dup(0), "rb") as inbox, os.fdopen(os.dup(1), "wb") as outbox:
        os.dup2(2, 1)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        signals.leave_to_parent()

        def tell(what: str, content: Any) -> None:
            outbox.write(pickle.dumps((what, content), protocol=5))
            outbox.flush()

        with contextlib.suppress(BrokenPipeError, EOFError):  # the parent is gone
            progress, timeout, memory = pickle.load(inbox)
            with open(progress, "r+b") as file:
                count = mmap.mmap(file.fileno(), _COUNT.size)
            if memory is not None:
                import resource  # not everywhere, and only needed here

                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            try:
                verifiers: dict[str, Verifier] = pickle.load(inbox)
                for verifier in verifiers.values():
                    getattr(verifier, "warm_up", lambda: None)()
            except Exception as problem:
                tell("broken", f"A verifier cannot be used in a process of its own: {_words(problem)}.")
                return
            tell("ready", None)
            while True:
                _check_chunk(pickle.load(inbox), verifiers, count, timeout, tell)


def _check_chunk(
    items: list[bytes], verifiers: dict[str, Verifier], count: mmap.mmap, timeout: float, tell: Any
) -> None:
    results: list[Result] = []
    account = usage.Account()

    def tell_results() -> None:
        # What they took comes first: with the last result nobody listens any more.
        used = account.take()
        if used:
            tell("used", used)
        tell("results", results)

    flushed = time.monotonic()
    for number, item in enumerate(items, 1):
        # By default the signal ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
        _COUNT.pack_into(count, 0, number)
        results.append(_check(item, verifiers))
        if time.monotonic() - flushed > FLUSH_EVERY:
            tell_results()
            results, flushed = [], time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    _COUNT.pack_into(count, 0, _MORE_THAN_ANY_ITEM)
    tell_results()


def _check(item: bytes, verifiers: dict[str, Verifier]) -> Result:
    try:
        name, completion, task = pickle.loads(item)
        result = checked(verifiers[name], completion, task)
        pickle.dumps(result)
    except Exception as problem:
        return Failure("error", f"The check cannot cross between processes ({_words(problem)}).")
    return result


def checked(verifier: Verifier, completion: str, task: Task) -> Result:
    """What a verifier says, as a result, whatever it raises or returns."""
    try:
        result: object = verifier.verify(completion, task)
    except VerificationError as problem:
        return Failure("error", str(problem))
    except BaseException as problem:  # even SystemExit: what a verifier raises concerns its item alone
        return Failure("error", f"The verifier {verifier.name} failed with {_words(problem)}.")
    return as_result(result, verifier.name)


def as_result(result: object, name: str) -> Result:
    """What a verifier returned, or a failure if it is no score."""
    if isinstance(result, Score | Failure):
        return result
    return Failure("error", f"The verifier {name} returned {type(result).__name__} instead of a score.")


def _words(problem: BaseException) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300].rstrip(": .")
