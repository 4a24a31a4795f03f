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
from typing import Any

from rehearsal.errors import RewardError
from rehearsal.rewards.threads import check_in_threads
from rehearsal.rewards.verifier import Failure, Score, Task, Verifier
from rehearsal.rewards.worker import WorkerEndedError, WorkerProcess

Result = Score | Failure

_START_TRIES = 3
"""Processes that may die in a row before they have begun a check; after that the pool gives up."""
_SLOW_START = 30.0
"""Seconds that a process may take to begin a chunk, over and above the time limit of a check."""


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


class _Batch:
    """What one call waits for."""

    def __init__(self, size: int) -> None:
        self.results: list[Result | None] = [None] * size
        self.broken: Exception | None = None
        self._open = size
        self._lock = threading.Lock()
        self.done = threading.Event()

    def put(self, index: int, result: Result) -> None:
        with self._lock:
            if self.results[index] is not None:
                return
            self.results[index] = result
            self._open -= 1
            if self._open == 0:
                self.done.set()

    def fail(self, problem: Exception) -> None:
        self.broken = problem
        self.done.set()


@dataclass
class _Item:
    batch: _Batch
    index: int
    content: bytes


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
        restarts: processes that had to be replaced.

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
        self.restarts = 0
        self._chunk = chunk
        self._memory = memory
        self._threads = threads
        self._thread_timeout = thread_timeout
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._closed = False
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        self._sent = {name: v for name, v in named.items() if getattr(v, "runs_in", "process") != "thread"}
        self._drivers: list[threading.Thread] = []
        self._warm: list[threading.Event] = []
        self._broken: Exception | None = None
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
            for number in range(int(limits["workers"] or 1)):
                place = Path(self._folder.name) / str(number)
                warm = threading.Event()
                driver = threading.Thread(
                    target=self._drive, args=(place, warm), daemon=True, name=f"verifiers-{number}"
                )
                self._warm.append(warm)
                self._drivers.append(driver)
                driver.start()

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
        if self._closed:
            raise RewardError("This pool of verifiers is closed; make another one.")
        started = time.perf_counter()
        batch = _Batch(len(completions))
        items: list[_Item] = []
        threaded: dict[str, list[int]] = {}
        for index, (name, completion, task) in enumerate(zip(chosen, completions, tasks, strict=True)):
            if name not in self._sent:
                threaded.setdefault(name, []).append(index)
                continue
            try:
                items.append(_Item(batch, index, pickle.dumps((name, completion, task), protocol=5)))
            except Exception as problem:
                words = f"The task cannot be sent to another process ({type(problem).__name__}: {problem})."
                batch.put(index, Failure("error", words))
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
        for warm in self._warm:
            warm.wait()
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """End the processes. Checks that other threads still wait for are finished first."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for _ in self._drivers:
            self._queue.put(None)
        for driver in self._drivers:
            driver.join()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    def _chunks(self, items: list[_Item]) -> list[list[_Item]]:
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

    # --- one thread for each process

    def _drive(self, place: Path, warm: threading.Event) -> None:
        try:
            worker = self._start(place)
        except (RewardError, OSError) as problem:
            self._broken = problem
            warm.set()
            self._refuse(problem)
            return
        warm.set()
        while (chunk := self._queue.get()) is not None:
            try:
                worker = self._check(worker, chunk, place)
            except (RewardError, OSError) as problem:
                for item in chunk:
                    item.batch.fail(problem)
                self._refuse(problem)
                return
        worker.close()

    def _start(self, place: Path) -> WorkerProcess:
        for attempt in range(_START_TRIES):
            worker = WorkerProcess(self._sent, place, self.timeout, self._memory, self._start_timeout)
            try:
                worker.wait_until_ready()
                return worker
            except RewardError:
                worker.kill()
                raise
            except WorkerEndedError as problem:
                worker.kill()
                if attempt == _START_TRIES - 1:
                    raise RewardError(
                        f"A process for verifiers {problem} {_START_TRIES} times in a row; "
                        "give it more memory or check its libraries."
                    ) from problem
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _refuse(self, problem: Exception) -> None:
        """What becomes of all further chunks once processes cannot be started."""
        while (chunk := self._queue.get()) is not None:
            for item in chunk:
                item.batch.fail(problem)

    def _check(self, worker: WorkerProcess, chunk: list[_Item], place: Path) -> WorkerProcess:
        """Let a process check a chunk, and as many others as it takes; returns the last one."""
        left = list(chunk)
        idle_deaths = 0
        while left:
            done, failure = self._watch(worker, left)
            left = left[done:]
            if failure is None:
                continue
            worker.kill()
            with self._lock:
                self.restarts += 1
            if failure.message:
                left[0].batch.put(left[0].index, failure)
                left = left[1:]
                idle_deaths = 0
            else:
                idle_deaths += 1
                if idle_deaths == _START_TRIES:
                    raise RewardError("Processes for verifiers die before they begin a check; look at the memory left.")
            worker = self._start(place)
        return worker

    def _watch(self, worker: WorkerProcess, items: list[_Item]) -> tuple[int, Failure | None]:
        """Send items and take in results until all are there or the process must be replaced.

        Returns:
            how many have their results, and the failure of the item after those; its message is empty where no item is
            to blame.
        """
        worker.send_chunk([item.content for item in items])
        tick = min(max(self.timeout / 20, 0.005), 0.25)
        done = 0

        def take(results: Sequence[Result]) -> int:
            for item, result in zip(items[done:], results, strict=False):
                item.batch.put(item.index, result)
            return done + len(results)

        seen, since = 0, time.monotonic()
        while done < len(items):
            try:
                results = worker.receive(tick)
            except WorkerEndedError as problem:
                return self._blamed(worker, items, done, f"The process of the verifier {problem}.", "crash")
            done = take(results)
            begun, now = worker.begun, time.monotonic()
            if begun != seen or results:
                seen, since = begun, now
            elif now - since > self.timeout + (0.0 if 0 < begun <= len(items) else _SLOW_START):
                worker.kill()
                # What was on its way when it was killed is still good.
                try:
                    while more := worker.receive(1.0):
                        done = take(more)
                except WorkerEndedError:
                    pass
                return self._blamed(worker, items, done, f"The check took longer than {self.timeout:g} s.", "timeout")
        return done, None

    def _blamed(
        self, worker: WorkerProcess, items: list[_Item], done: int, message: str, kind: Any
    ) -> tuple[int, Failure | None]:
        begun = worker.begun
        if done < begun <= len(items):
            # Those between what was received and the one to blame had scores that were lost with the process; they are
            # checked again, after it has been put aside.
            guilty = items.pop(begun - 1)
            items.insert(done, guilty)
            return done, Failure(kind, message)
        return done, Failure(kind, "")


