"""Which processes belong to a cell, what memory they use, and how they all end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import NamedTuple

PROC = "/proc"

_BYTES_OF_A_DESCRIPTOR, _FREE_DESCRIPTORS = 256 << 10, 8
"""What the kernel may hold for a descriptor: a socket of a pair that was sent all that it takes, a little more than the
208 KiB that its sender may have on its way, is the worst of them; a pipe holds 64 KiB. The first ones of a process, of
which some are its standard streams, count for nothing."""
_SMALLEST_TABLE = 64


class Usage(NamedTuple):
    """Of all processes below one: how many tasks (threads count), and bytes that belong to them alone or to shared
    memory. Pages that a fork has not copied yet count for each of its processes, and so does what the kernel may hold
    for descriptors, since what it does hold cannot be seen."""

    tasks: int
    memory_bytes: int


def own_number(proc: int) -> int:
    """The number of this process in the namespace that a ``/proc`` (a descriptor of that folder) shows."""
    return int(os.readlink("self", dir_fd=proc))


def below(root: int, proc: int) -> list[int]:
    """All processes that descend from ``root``, by the numbers that ``proc`` shows."""
    parents: dict[int, int] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name in brackets may hold anything, brackets too.
                parents[int(name)] = int(_read(f"{name}/stat", proc).rpartition(b")")[2].split()[1])
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found, waiting = [], list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, ())
    return found


def usage(root: int, proc: int) -> Usage:
    """What the processes below ``root`` use now."""
    tasks = memory = 0
    for pid in below(root, proc):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in _read(f"{pid}/status", proc).splitlines():
                if line.startswith((b"RssAnon:", b"RssShmem:")):
                    memory += int(line.split()[1]) * 1024
                elif line.startswith(b"FDSize:"):
                    open_now = _descriptors(pid, proc, int(line.split()[1]))
                    memory += max(0, open_now - _FREE_DESCRIPTORS) * _BYTES_OF_A_DESCRIPTOR
                elif line.startswith(b"Threads:"):
                    tasks += int(line.split()[1])
    return Usage(tasks, memory)


def _descriptors(pid: int, proc: int, table: int) -> int:
    """How many descriptors a process has open. Before Linux 6.2 only the size of its table can be seen, which is up
    to twice as many; the smallest one, of 64, may be nearly empty and counts for nothing."""
    size = 0
    with contextlib.suppress(OSError):
        size = os.stat(f"{pid}/fd", dir_fd=proc).st_size
    return size or (table if table > _SMALLEST_TABLE else 0)


def tasks_of_user(user: int, proc: int) -> int:
    """How many tasks a user runs: without a namespace of users, its limit counts them all."""
    count = 0
    for name in os.listdir(proc):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                lines = _read(f"{name}/status", proc).splitlines()
                fields = dict(line.split(b":", 1) for line in lines if b":" in line)
                if int(fields[b"Uid"].split()[0]) == user:
                    count += int(fields[b"Threads"])
    return count


def kill_below(root: int, rounds: int = 50) -> None:
    """End all that descends from ``root`` in its own namespace. All are stopped first, so that none forks meanwhile."""
    proc = os.open(PROC, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(rounds):
            found = below(root, proc)
            for how in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    with contextlib.suppress(OSError):
                        os.kill(pid, how)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not found:
                return
            time.sleep(0.002)
    finally:
        os.close(proc)


def _read(path: str, proc: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY, dir_fd=proc)
    try:
        return os.read(descriptor, 8192)
    finally:
        os.close(descriptor)
