"""Checks that wait for something else, such as a server: in threads of this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from rehearsal.rewards.verifier import Failure, Score, Task, Verifier
from rehearsal.rewards.worker import as_result, checked

Result = Score | Failure


def check_in_threads(
    verifier: Verifier, completions: Sequence[str], tasks: Sequence[Task], threads: int, timeout: float
) -> list[Result]:
    """Check completions in threads, or all in one call where the verifier has ``verify_batch``.

    A thread cannot be stopped. One that takes longer than ``timeout`` seconds over a check is left behind, another one
    takes its place, and the check counts as a failure; what it finds later is not looked at.
    """
    together = getattr(verifier, "verify_batch", None)
    if together is not None:
        return _all_at_once(verifier, together, completions, tasks, timeout)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(completions)):
        waiting.put(index)
    finished: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
    begun: dict[int, float] = {}

    def work() -> None:
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            begun[index] = time.monotonic()
            finished.put((index, checked(verifier, completions[index], tasks[index])))

    results: dict[int, Result] = {}
    for _ in range(min(threads, len(completions))):
        _start(work)
    while len(results) < len(completions):
        try:
            index, result = finished.get(timeout=min(timeout / 10, 1.0))
            results.setdefault(index, result)
        except queue.Empty:
            now = time.monotonic()
            for index, since in list(begun.items()):
                if index not in results and now - since > timeout:
                    results[index] = _too_slow(timeout)
                    _start(work)
    return [results[index] for index in range(len(completions))]


def _all_at_once(
    verifier: Verifier, together: Any, completions: Sequence[str], tasks: Sequence[Task], timeout: float
) -> list[Result]:
    answer: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results = [as_result(result, verifier.name) for result in together(completions, tasks)]
            if len(results) != len(completions):
                raise ValueError(f"{len(results)} results for {len(completions)} completions")
        except BaseException as problem:  # even SystemExit: nobody may wait for a thread that is gone
            words = f"The verifier {verifier.name} failed with {type(problem).__name__}: {problem}"
            results = [Failure("error", words)] * len(completions)
        answer.put(results)

    _start(work)
    try:
        return answer.get(timeout=timeout)
    except queue.Empty:
        return [_too_slow(timeout)] * len(completions)


def _too_slow(timeout: float) -> Failure:
    return Failure("timeout", f"The check took longer than {timeout:g} s.")


def _start(work: Any) -> None:
    threading.Thread(target=work, daemon=True, name="rehearsal-check").start()
