"""Calls with a time limit that works off the main thread too, where signals would not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class LateError(Exception):
    """A call took longer than it may.

    Attributes:
        seconds: that it may take.
        done: set once it has come back all the same.
    """

    def __init__(self, seconds: float, done: threading.Event) -> None:
        super().__init__(f"no answer in {seconds:g} s")
        self.seconds = seconds
        self.done = done


def in_time(function: Callable[[], T], seconds: float, name: str) -> T:
    """Call a function in a thread of its own, which is left behind if it takes too long.

    Args:
        function: somebody else's code; what it raises is raised here.
        seconds: that it may take.
        name: of the thread.

    Raises:
        LateError: if it takes longer.
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, daemon=True, name=name).start()
    if not done.wait(seconds):
        raise LateError(seconds, done)
    for error in errors:
        if isinstance(error, KeyboardInterrupt):  # the user's own arrives in the main thread
            raise RuntimeError("interrupted") from error
        raise error
    return results[0]
