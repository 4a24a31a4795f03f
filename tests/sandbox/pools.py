"""What the tests of the sandbox share: small limits, the levels that are to be had, and who runs in a sandbox.

Root cannot use the weakest level with a Python that only root may read; the tests then use the system's own one inside.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rehearsal.errors import SandboxError
from rehearsal.sandbox import InterpreterPool, Isolation, Limits, available
from rehearsal.sandbox.inside import processes

MIB = 1024 * 1024
SMALL = Limits(
    seconds=5, memory_bytes=128 * MIB, processes=8, file_bytes=4 * MIB, files=32, output_bytes=10_000
)  # fmt: skip
SYSTEM_PYTHON = "/usr/bin/python3"


@functools.cache
def python_for(level: Isolation) -> str | None:
    """The Python to use inside; skips where the level is not to be had."""
    reason = available()[level]
    if not reason:
        return None
    if os.path.exists(SYSTEM_PYTHON):
        try:
            if not available(SYSTEM_PYTHON)[level]:
                return SYSTEM_PYTHON
        except SandboxError:
            pass
    pytest.skip(f"{level.value}: {reason}")


def below(pool: InterpreterPool) -> set[int]:
    """The processes of a pool's sandbox, as the host sees them."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return {pid for pid in processes.below(pool._zygote._process.pid, proc) if not is_zombie(pid)}
    finally:
        os.close(proc)


def idle_processes(pool: InterpreterPool) -> set[int]:
    """Those of a pool without interpreters: whatever builds the wall, and the zygote."""
    if pool.isolation < Isolation.NAMESPACES:
        return set()
    return {pid for pid in below(pool) if parent_of(pid) == pool._zygote._process.pid}


def parent_of(pid: int) -> int:
    """The parent of a process; 0 once it is gone."""
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def children_of(parent: int) -> list[int]:
    """The processes that one has begun itself."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and parent_of(int(name)) == parent]


def is_zombie(pid: int) -> bool:
    try:
        return _stat(pid)[0] == "Z"
    except OSError:
        return True


def _stat(pid: int) -> list[str]:
    """State, parent and so on of a process; an OSError once it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
