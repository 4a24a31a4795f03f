"""What the soak watches and what it kills: memory, processes, threads, descriptors and files of this process and of all
below it, at quiet moments; and SIGKILL for processes below it, at random ones."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import memory
from rehearsal.sandbox.inside import processes

_SECONDS_TO_SETTLE = 60.0
_STARTED = 15.0
"""Seconds after which a process has loaded its libraries."""
_YOUNG = 10.0
"""Seconds for which the MCP server is left in peace, so that it gets to its feet."""
KINDS = {
    "verifier": "rehearsal.rewards.worker",
    "sandbox": "rehearsal.sandbox.inside.zygote",
    "server": "soak_server.py",
}
"""What may be killed from outside, and how its command is known."""


# What is watched


def processes_below(root: int) -> dict[int, str]:
    """The processes that descend from one, with their commands; those that ended and were not fetched have none."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    found: dict[int, str] = {}
    try:
        for pid in processes.below(root, proc):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found[pid] = b" ".join(words).decode("utf-8", "replace")
    finally:
        os.close(proc)
    return found


@dataclass(frozen=True)
class State:
    """What this process holds at a quiet moment.

    Attributes:
        rss: bytes of memory that this process occupies.
        used: bytes of it that somebody holds, of the C library's allocator (see :func:`in_use`); and
        blocks: of Python's own allocator, which takes what is small.
        each: by kind of process below this one, bytes that the largest one occupies that is not just starting. Not the
            sum: how many there are just now depends on what was killed last.
        below: bytes of all processes below together, shared pages divided by their users.
        children: processes below this one and orphans of theirs.
        threads, descriptors: their numbers.
        files: in the folder for temporary files.
    """

    rss: int
    used: int
    blocks: int
    each: dict[str, int]
    below: int
    children: int
    threads: int
    descriptors: int
    files: int

    @classmethod
    def now(cls, folder: Path) -> State:
        gc.collect()
        used = in_use()
        shares: dict[str, list[int]] = {}
        each: dict[str, int] = {}
        for pid, command in processes_below(os.getpid()).items():
            kind = next((name for name, known in KINDS.items() if known in command), "other")
            shares.setdefault(kind, []).append(share_of(pid))
            if age(pid) > _STARTED:
                each[kind] = max(each.get(kind, 0), share_of(pid, "Rss:"))
        return cls(
            memory("VmRSS"), used, sys.getallocatedblocks(), each, sum(sum(found) for found in shares.values()),
            len(processes_below(os.getppid())) - 1,
            len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), len(list(folder.iterdir())),
        )  # fmt: skip

    def beyond(self, other: State) -> dict[str, int]:
        """What there is more of than in another state, memory apart."""
        names = ("children", "threads", "descriptors", "files")
        return {name: max(0, getattr(self, name) - getattr(other, name)) for name in names}


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def in_use() -> int:
    """Bytes that the C library's allocator has given out, by ``mallinfo2``; 0 where there is none.

    Free pages are returned to the system first. What a process occupies grows beyond this: some dozens of threads have
    as many heaps as there may be, and these go on filling with holes for more than a thousand episodes, although
    nothing is kept.
    """
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mallinfo2.restype = _Mallinfo
        found = library.mallinfo2()
    except (AttributeError, OSError):
        return 0
    return int(found.uordblks + found.hblkhd)


def share_of(pid: int, which: str = "Pss:") -> int:
    """Bytes of a process; 0 if it has ended. "Pss:" divides shared pages by their users, "Rss:" does not."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)
    return 0


def settled(folder: Path, like: State | None = None) -> State:
    """The state once what ends by itself has ended: what was left behind takes seconds to notice."""
    deadline = time.monotonic() + _SECONDS_TO_SETTLE
    while True:
        state = State.now(folder)
        if like is None or not any(state.beyond(like).values()) or time.monotonic() > deadline:
            return state
        time.sleep(0.25)


def slope(values: Sequence[float], episodes: Sequence[float]) -> tuple[float, float]:
    """The slope of a line through the points, and half the width of its 95% interval."""
    n = len(values)
    x, y = statistics.fmean(episodes), statistics.fmean(values)
    spread = sum((e - x) ** 2 for e in episodes)
    rise = sum((e - x) * (v - y) for e, v in zip(episodes, values, strict=True)) / spread
    rest = sum((v - y - rise * (e - x)) ** 2 for e, v in zip(episodes, values, strict=True))
    if n < 3:
        return rise, math.inf
    # Student's quantile from the normal one (Abramowitz and Stegun, 26.7.5).
    z, free = statistics.NormalDist().inv_cdf(0.975), n - 2
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return rise, t * math.sqrt(rest / free / spread)


# What is killed from outside


def age(pid: int) -> float:
    """Seconds since a process began; 0 if it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        begun = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - begun / os.sysconf("SC_CLK_TCK")
    return 0.0


class Chaos:
    """Sends SIGKILL to processes below this one at random moments, until it is stopped.

    Attributes:
        kills: how many of each kind.
    """

    def __init__(self, seed: int, seconds: float, patience: float) -> None:
        self.kills: Counter[str] = Counter()
        self._rng = random.Random(f"chaos {seed}")
        self._seconds, self._young = seconds, patience * _YOUNG
        self._leave = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing is killed inside the block."""
        with self._turn:
            yield

    def stop(self) -> None:
        self._leave.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._leave.wait(self._rng.uniform(0.2, 1.8) * self._seconds):
            with self._turn:
                kind = self._rng.choice(["sandbox", "sandbox", "sandbox", "verifier", "verifier", "server"])
                found = [pid for pid, command in processes_below(os.getpid()).items() if KINDS[kind] in command]
                if kind == "server":
                    # One that never gets to its feet would leave nothing to see of the rest.
                    found = [pid for pid in found if age(pid) > self._young]
                if found:
                    # The first one is the zygote itself, or the process around it: all interpreters end with it.
                    pid = min(found) if self._rng.random() < 0.3 else self._rng.choice(found)
                    self.kills[kind] += _killed(pid, KINDS[kind])


def _killed(pid: int, command: str) -> bool:
    """Kill a process, unless its number has gone to another one meanwhile."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if command.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
