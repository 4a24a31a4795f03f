"""Stop signals in the processes that a run starts: the run decides what becomes of its step, so they wait for it.

A process group of their own is not enough. A shell and GNU ``timeout`` signal a group, but systemd and SLURM signal
every process that they can find.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside the block this thread takes no stop signals, and neither does a process that it starts there, from its
    very first moment until it calls :func:`leave_to_parent`. What comes meanwhile is taken after the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Let stop signals do nothing in this process, which ends when its parent says so or is gone.

    They are caught and not ignored: what is ignored stays so in every program that this process starts.
    """
    for number in _STOPS:
        signal.signal(number, _do_nothing)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _do_nothing(number: int, frame: Any) -> None:
    pass
