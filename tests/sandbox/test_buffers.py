"""What the kernel holds for sandboxed processes in pipes and sockets has a bound, and counts as memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rehearsal.sandbox import InterpreterPool, Isolation, Limits, Outcome, run_program
from rehearsal.sandbox.inside import seccomp

sys.path.insert(0, str(Path(__file__).parent))

from pools import MIB, python_for

FILES = 128
PER_PROCESS = FILES * 256 << 10
"""Bytes at most: each descriptor a socket that was sent all that it takes."""

FILL = """
import fcntl, os, socket, time

def fill(most, grow):
    held, kept = 0, []
    try:
        for _ in range(most):
            pair = socket.socketpair()
            kept.append(pair)
            for end in pair:
                end.setblocking(False)
                try:
                    if grow: end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
                except OSError: pass
                try:
                    while True: held += end.send(b"x" * 65536)
                except BlockingIOError: pass
    except OSError: pass
    return held, kept

def fill_pipes():
    held, kept = 0, []
    try:
        while True:
            kept.append(os.pipe())
            os.set_blocking(kept[-1][1], False)
            try: fcntl.fcntl(kept[-1][1], 1031, 1 << 20)
            except OSError: pass
            try:
                while True: held += os.write(kept[-1][1], b"x" * 65536)
            except BlockingIOError: pass
    except OSError: pass
    for ends in kept:
        for end in ends: os.close(end)
    return held
"""


FORK = """
def fork(work, count=8):
    children = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            held = work()
            time.sleep(1.0)
            os._exit(0)
        children.append(pid)
    for pid in children: os.waitpid(pid, 0)
"""


@pytest.fixture(params=list(Isolation), ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> Isolation:
    python_for(request.param)
    if not seccomp.is_known():
        pytest.skip("no filter of system calls is known for this processor")
    return request.param


def test_one_process_cannot_make_its_buffers_larger(level: Isolation) -> None:
    limits = Limits(seconds=20, files=FILES)
    source = FILL + f"print(fill_pipes())\nprint(fill({FILES}, grow=True)[0])\n"
    result = run_program(source, limits=limits, isolation=level, python=python_for(level))
    assert result.outcome is Outcome.FINISHED, result
    pipes, sockets = map(int, result.stdout.split())
    assert 0 < pipes <= FILES / 2 * (64 << 10)
    # They were filled: the bound is not kept for another reason.
    assert PER_PROCESS / 4 < sockets <= PER_PROCESS


def test_buffers_count_as_memory(level: Isolation) -> None:
    limits = Limits(seconds=20, files=FILES, memory_bytes=64 * MIB, processes=12)
    with (
        InterpreterPool(1, limits=limits, isolation=level, spare=0, python=python_for(level)) as pool,
        pool.interpreter() as it,
    ):
        few = it.run(FILL + FORK + "fork(lambda: fill(2, False))\nprint('done')")
        assert (few.outcome, few.output) == (Outcome.FINISHED, "done\n"), few
        many = it.run("fork(lambda: fill(500, False))\nprint('done')")
        assert many.outcome is Outcome.MEMORY, many


def test_workers_with_a_few_descriptors_each_cost_little(level: Isolation) -> None:
    """As of a pool of processes, with pipes that all of them share."""
    limits = Limits(seconds=20, memory_bytes=256 * MIB, processes=12)
    source = """
import os, time
ends = [os.pipe() for _ in range(8)]
children = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        time.sleep(1.0)
        os._exit(0)
    children.append(pid)
for pid in children: os.waitpid(pid, 0)
print("done")
"""
    result = run_program(source, limits=limits, isolation=level, python=python_for(level))
    assert (result.outcome, result.stdout) == (Outcome.FINISHED, "done\n")
