"""The thread in the parent that looks after one process of a pool."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rehearsal.errors import RewardError
from rehearsal.rewards.verifier import Failure, Score, Verifier
from rehearsal.rewards.worker import WorkerEndedError, WorkerProcess

Result = Score | Failure

CLOSED = "This pool of verifiers is closed; make another one."

_START_TRIES = 3
"""Processes that may die in a row before they have begun a check; after that nothing more is tried."""
_SLOW_START = 30.0
"""Seconds that a process may take to begin a chunk, over and above the time limit of a check."""


class Batch:
    """The results that one caller waits for."""

    def __init__(self, size: int) -> None:
        self.results: list[Result | None] = [None] * size
        self.broken: Exception | None = None
        self.done = threading.Event()
        self._open = size
        self._lock = threading.Lock()

    def put(self, index: int, result: Result) -> None:
        with self._lock:
            if self.results[index] is None:
                self.results[index] = result
                self._open -= 1
                if self._open == 0:
                    self.done.set()

    def fail(self, problem: Exception) -> None:
        """Let the caller raise."""
        self.broken = problem
        self.done.set()


@dataclass
class Item:
    """One check: where its result belongs, and what the process needs, pickled."""

    batch: Batch
    index: int
    content: bytes


@dataclass(frozen=True)
class Limits:
    """What a process may take; see :class:`rehearsal.rewards.pool.VerifierPool`."""

    timeout: float
    memory: int | None
    start_timeout: float


class Driver:
    """Takes chunks from a queue until it finds None there, and has them checked by its process, or by another one where
    that hangs or dies.

    Attributes:
        warm: set once the process is ready, or cannot be.
        broken: why no process can be had, if so.
        restarts: processes that were replaced.
        stop: set it to have the present chunk given up.
    """

    def __init__(
        self, chunks: queue.SimpleQueue[list[Item] | None], verifiers: Mapping[str, Verifier], limits: Limits,
        progress: Path,
    ) -> None:  # fmt: skip
        self.warm = threading.Event()
        self.broken: Exception | None = None
        self.restarts = 0
        self.stop = threading.Event()
        self._chunks = chunks
        self._verifiers = verifiers
        self._limits = limits
        self._progress = progress
        self.thread = threading.Thread(target=self._drive, daemon=True, name=f"verifiers-{progress.name}")
        self.thread.start()

    def _drive(self) -> None:
        try:
            worker = self._start()
        except Exception as problem:
            self._refuse(problem)
            return
        self.warm.set()
        while (chunk := self._chunks.get()) is not None:
            try:
                worker = self._check(worker, chunk)
            except Exception as problem:  # whatever it is: callers wait for this thread
                for item in chunk:
                    item.batch.fail(problem)
                self._refuse(problem)
                return
        worker.close()

    def _refuse(self, problem: Exception) -> None:
        """What becomes of all further chunks once no process can be had."""
        self.broken = problem
        self.warm.set()
        while (chunk := self._chunks.get()) is not None:
            for item in chunk:
                item.batch.fail(problem)

    def _start(self) -> WorkerProcess:
        for attempt in range(_START_TRIES):
            worker = WorkerProcess(
                self._verifiers, self._progress, self._limits.timeout, self._limits.memory, self._limits.start_timeout
            )
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

    def _check(self, worker: WorkerProcess, chunk: list[Item]) -> WorkerProcess:
        """Let a process check a chunk, and as many others as it takes; returns the last one."""
        left = list(chunk)
        idle_deaths = 0
        while left:
            done, failure = self._watch(worker, left)
            left = left[done:]
            if failure is None:
                continue
            worker.kill()
            self.restarts += 1
            if failure.message:
                left[0].batch.put(left[0].index, failure)
                left = left[1:]
                idle_deaths = 0
            else:
                idle_deaths += 1
                if idle_deaths == _START_TRIES:
                    raise RewardError("Processes for verifiers die before they begin a check; look at the memory left.")
            worker = self._start()
        return worker

    def _watch(self, worker: WorkerProcess, items: list[Item]) -> tuple[int, Failure | None]:
        """Send items and take in results until all are there or the process must be replaced.

        Returns:
            how many have their results, and the failure of the item after those; its message is empty where no item is
            to blame.
        """
        worker.send_chunk([item.content for item in items])
        tick = min(max(self._limits.timeout / 20, 0.005), 0.25)
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
            if self.stop.is_set():
                worker.kill()
                raise RewardError(CLOSED)
            begun, now = worker.begun, time.monotonic()
            if begun != seen or results:
                seen, since = begun, now
            elif now - since > self._limits.timeout + (0.0 if 0 < begun <= len(items) else _SLOW_START):
                worker.kill()
                # What was on its way when it was killed is still good.
                try:
                    while more := worker.receive(1.0):
                        done = take(more)
                except WorkerEndedError:
                    pass
                return self._blamed(
                    worker, items, done, f"The check took longer than {self._limits.timeout:g} s.", "timeout"
                )
        return done, None

    def _blamed(
        self, worker: WorkerProcess, items: list[Item], done: int, message: str, kind: Literal["timeout", "crash"]
    ) -> tuple[int, Failure | None]:
        begun = worker.begun
        if done < begun <= len(items):
            # Those between what was received and the one to blame had scores that were lost with the process; they are
            # checked again, after it has been put aside.
            guilty = items.pop(begun - 1)
            items.insert(done, guilty)
            return done, Failure(kind, message)
        return done, Failure(kind, "")
