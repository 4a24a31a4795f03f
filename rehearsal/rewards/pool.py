"""Many completions checked at once, each within a hard time limit, and none of them able to stop a run.

Verifiers run in processes that are started once and stay warm. The time limit is kept by the parent, which kills a
process that spends too long on one check and starts another: it needs no signals in the caller, so it works from any
thread, and it stops native code and regular expressions that hold Python's lock. Items travel in chunks, since sending
them one by one would cost more than many of them take; a check that hangs or kills its process costs only itself, and
the rest of its chunk is done by the next process. Why so, and not with ``signal.alarm`` around the call: verl did, the
alarm raises anywhere but in the main thread, the exception was caught, and every mathematical answer scored 0.

What cannot be scored is a :class:`Failure`, never a 0, and is counted.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

from rehearsal.errors import RewardError
from rehearsal.rewards.driver import CLOSED, Batch, Driver, Item, Limits, Working
from rehearsal.rewards.threads import check_in_threads
from rehearsal.rewards.verifier import Failure, Score, Task, Verifier

Result = Score | Failure


@dataclass
class Counters:
    """What became of the checks of one verifier.

    Attributes:
        checks: how many there were.
        passed: scores that count as solved.
        timeouts, crashes, errors: failures by kind.
        seconds: the callers' waiting, summed over their calls.
    """

    checks: int = 0
    passed: int = 0
    timeouts: int = 0
    crashes: int = 0
    errors: int = 0
    seconds: float = 0.0

    @property
    def failures(self) -> int:
        return self.timeouts + self.crashes + self.errors

    def figures(self) -> dict[str, float]:
        """All of it as numbers by name."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


class VerifierPool:
    """Checks completions in warm processes, several at once. May be called from several threads; close it after use.

    Args:
        verifiers: one verifier, or several by name.
        workers: processes; as many as this process may use cores if None.
        timeout: seconds that one check may take, by the clock.
        chunk: the most items that are sent to a process at once.
        memory: bytes of address space that a process may use, so that a completion such as 9**9**9 ends in an error
            instead of an empty machine; None for no limit.
        threads: for verifiers that run in threads: how many checks at once.
        thread_timeout: seconds after which a check in a thread is given up. They keep their own time limits; this one
            is for those that fail to, and its thread is left behind.
        start_timeout: seconds that a process may take to load its libraries.

    Attributes:
        counters: by name of a verifier.

    Raises:
        RewardError: for limits that are not above 0, and for verifiers that cannot be sent to a process.
    """

    def __init__(
        self, verifiers: Verifier | Mapping[str, Verifier], *, workers: int | None = None, timeout: float = 10.0,
        chunk: int = 32, memory: int | None = 4 << 30, threads: int = 32, thread_timeout: float = 900.0,
        start_timeout: float = 120.0,
    ) -> None:  # fmt: skip
        named = dict(verifiers) if isinstance(verifiers, Mapping) else {verifiers.name: verifiers}
        if not named:
            raise RewardError("A pool needs at least one verifier.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        limits: dict[str, float | None] = {
            "workers": cores if workers is None else workers, "timeout": timeout, "chunk": chunk, "memory": memory,
            "threads": threads, "thread_timeout": thread_timeout, "start_timeout": start_timeout,
        }  # fmt: skip
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise RewardError(f"{name} of a pool of verifiers must be above 0, not {limit}.")
        self.verifiers = named
        self.timeout = timeout
        self.counters = {name: Counters() for name in named}
        self._chunk = chunk
        self._threads = threads
        self._thread_timeout = thread_timeout
        self._lock = threading.Lock()
        self._closed = False
        self._queue: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        self._sent = {name: v for name, v in named.items() if getattr(v, "runs_in", "process") != "thread"}
        self._drivers: list[Driver] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if self._sent:
            try:
                pickle.dumps(self._sent, protocol=5)
            except Exception as problem:
                raise RewardError(
                    f"A verifier cannot be sent to another process ({type(problem).__name__}: {problem}); "
                    "make it of plain data, or let it run in threads."
                ) from problem
            self._folder = tempfile.TemporaryDirectory(prefix="rehearsal-verifiers-")
            count = int(limits["workers"] or 1)
            working = Working(count)
            for number in range(count):
                place = Path(self._folder.name) / str(number)
                allowed = Limits(timeout, memory, start_timeout)
                self._drivers.append(Driver(self._queue, self._sent, allowed, place, working))

    @property
    def restarts(self) -> int:
        """Processes that had to be replaced."""
        return sum(driver.restarts for driver in self._drivers)

    def verify(
        self, completions: Sequence[str], tasks: Sequence[Task], names: Sequence[str] | str | None = None
    ) -> list[Result]:
        """Check completions, and wait for all of them.

        Args:
            completions: what the agent answered.
            tasks: what each is checked against.
            names: which verifier checks which, or one for all; may be left out where the pool has only one.

        Returns:
            for each completion, in order, a :class:`Score` or a :class:`Failure`.

        Raises:
            RewardError: for lists of different lengths, unknown names, a pool that is closed, or verifiers that cannot
                work at all, such as for want of a library.
        """
        chosen = self._names(names, len(completions))
        if len(completions) != len(tasks):
            raise RewardError(f"There are {len(completions)} completions for {len(tasks)} tasks; each needs its own.")
        started = time.perf_counter()
        batch = Batch(len(completions))
        items: list[Item] = []
        threaded: dict[str, list[int]] = {}
        for index, (name, completion, task) in enumerate(zip(chosen, completions, tasks, strict=True)):
            if name not in self._sent:
                threaded.setdefault(name, []).append(index)
                continue
            try:
                items.append(Item(batch, index, pickle.dumps((name, completion, task), protocol=5)))
            except Exception as problem:
                words = f"The task cannot be sent to another process ({type(problem).__name__}: {problem})."
                batch.put(index, Failure("error", words))
        with self._lock:  # so that nothing comes behind what close() puts there
            if self._closed:
                raise RewardError(CLOSED)
            for chunk in self._chunks(items):
                self._queue.put(chunk)
        for name, indices in threaded.items():
            results = check_in_threads(
                self.verifiers[name], [completions[i] for i in indices], [tasks[i] for i in indices],
                self._threads, self._thread_timeout,
            )  # fmt: skip
            for index, result in zip(indices, results, strict=True):
                batch.put(index, result)
        if completions:
            batch.done.wait()
        if batch.broken is not None:
            raise batch.broken
        found = [result for result in batch.results if result is not None]
        self._count(chosen, found, time.perf_counter() - started)
        return found

    def wait_until_warm(self) -> None:
        """Wait until all processes have loaded their libraries. A check that comes before simply waits as long.

        Raises:
            RewardError: if they cannot.
        """
        for driver in self._drivers:
            driver.warm.wait()
            if driver.broken is not None:
                raise driver.broken

    def close(self, *, now: bool = False) -> None:
        """End the processes.

        Args:
            now: give up what other threads still wait for, which raises there; it is finished first otherwise.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if now:
                for driver in self._drivers:
                    driver.stop.set()
                with contextlib.suppress(queue.Empty):
                    while True:
                        for item in self._queue.get_nowait() or ():
                            item.batch.fail(RewardError(CLOSED))
            for _ in self._drivers:
                self._queue.put(None)
        for driver in self._drivers:
            driver.thread.join()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After Ctrl-C, nobody wants to wait for the rest.
        self.close(now=kind is not None)

    # --- the caller's side

    def _names(self, names: Sequence[str] | str | None, count: int) -> list[str]:
        if names is None:
            if len(self.verifiers) > 1:
                raise RewardError(f"Say which of these verifiers checks what: {', '.join(sorted(self.verifiers))}.")
            names = next(iter(self.verifiers))
        chosen = [names] * count if isinstance(names, str) else list(names)
        for name in chosen:
            if name not in self.verifiers:
                raise RewardError(
                    f"This pool has no verifier {name!r}; there are: {', '.join(sorted(self.verifiers))}."
                )
        if len(chosen) != count:
            raise RewardError(f"There are {len(chosen)} names of verifiers for {count} completions.")
        return chosen

    def _chunks(self, items: list[Item]) -> list[list[Item]]:
        """Small enough that every process gets several: checks differ in length, and none should end long after the
        others."""
        size = max(1, min(self._chunk, len(items) // (4 * max(len(self._drivers), 1))))
        return [items[i : i + size] for i in range(0, len(items), size)]

    def _count(self, names: Sequence[str], results: Sequence[Result], seconds: float) -> None:
        with self._lock:
            for name in set(names):
                self.counters[name].seconds += seconds
            for name, result in zip(names, results, strict=True):
                counters = self.counters[name]
                counters.checks += 1
                if isinstance(result, Score):
                    counters.passed += result.passed
                else:
                    plural = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}[result.kind]
                    setattr(counters, plural, getattr(counters, plural) + 1)
