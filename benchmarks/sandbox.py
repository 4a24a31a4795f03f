"""The sandbox: what a call costs over a plain pipe, how soon an interpreter is there, and memory of 32 at once.

A warm call is compared with the least that any interpreter in another process could cost: a Python process that reads a
line of source from a pipe, runs it and writes a line back, with no sandbox at all. Both run the same statement and are
timed in turn. The start is from asking the pool to the first answer, once with a spare interpreter waiting and once
without. Memory is the proportional share (PSS) of all processes of the sandbox, so that pages which forks share count
once; what they take in addition to the same pool without interpreters is a figure of its own.

The environment ``repair`` runs a program against its tests after every edit. That is timed over the same run in this
process, with lines counted and no sandbox, as its own solutions are run; every program is another one, since what was
run before is remembered.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import interleaved, parser, report, say
from rehearsal.environments import make
from rehearsal.environments.repair.running import ProgramRunner, run_own
from rehearsal.sandbox import InterpreterPool, Limits
from rehearsal.sandbox.inside import processes

STATEMENT = "x = sum(range(10)); print(x)"
_PLAIN = """
import contextlib, io, sys
names = {}
for line in sys.stdin:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(line, names)
    print(repr(out.getvalue()), flush=True)
"""


def plain_pipe() -> tuple[subprocess.Popen[str], Callable[[], None]]:
    """A bare Python process, and a call of it."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def call() -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(STATEMENT + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "'45\\n'\n"

    return process, call


def shared_memory(root: int) -> int:
    """Bytes of a process and all below it, shared pages divided by their users."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    total = 0
    try:
        for pid in (root, *processes.below(root, proc)):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    finally:
        os.close(proc)
    return total


def start(pool: InterpreterPool, pause: float) -> float:
    """Seconds from asking for an interpreter to its first answer."""
    time.sleep(pause)
    begun = time.perf_counter()
    with pool.interpreter() as taken:
        assert taken.run(STATEMENT).output == "45\n"
        return time.perf_counter() - begun


def repair_runs(count: int, isolation: str | None) -> dict[str, Callable[[], None]]:
    """The programs of repair's tasks against their tests: in the sandbox, and in this process."""
    env = make("repair")
    tasks = []
    for seed in range(count):
        env.reset(seed=seed)
        task = env._present
        tasks.append((task.program.function, env.describe()["program"], task.calls))
    runner = ProgramRunner(isolation)
    inside, outside = itertools.cycle(tasks), itertools.cycle(tasks)

    def sandboxed() -> None:
        runner._known.clear()
        assert runner.run(*next(inside)).answers

    def own() -> None:
        assert run_own(*next(outside)).answers

    return {"own": own, "sandbox": sandboxed, "close": runner.close}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--interpreters", type=int, default=32, help="how many at once, for their memory")
    options.add_argument("--isolation", default=None, help="the level; the strongest one there is if left out")
    args = options.parse_args()
    calls, starts = (200, 10) if args.quick else (2000, 50)
    figures: dict[str, float] = {}
    limits = Limits(seconds=60)
    with InterpreterPool(args.interpreters, limits=limits, isolation=args.isolation) as pool:
        say(f"isolation: {pool.isolation.value}")
        process, plain = plain_pipe()
        with pool.interpreter() as warm:

            def sandboxed() -> None:
                assert warm.run(STATEMENT).output == "45\n"

            seconds = interleaved({"plain": plain, "sandbox": sandboxed}, calls, warmup=20)
        process.kill()
        process.communicate()
        for name, values in seconds.items():
            figures[f"{name}_call_ms"] = 1000 * statistics.median(values)
            figures[f"{name}_call_p99_ms"] = 1000 * sorted(values)[int(0.99 * len(values))]
        figures["call_over_plain_ms"] = figures["sandbox_call_ms"] - figures["plain_call_ms"]
        say(f"a warm call costs {figures['call_over_plain_ms']:.2f} ms over a plain pipe")
        figures["start_with_spare_ms"] = 1000 * statistics.median([start(pool, 0.1) for _ in range(starts)])

    with InterpreterPool(args.interpreters, limits=limits, isolation=args.isolation, spare=0) as pool:
        start(pool, 0.0)
        figures["start_without_spare_ms"] = 1000 * statistics.median([start(pool, 0.0) for _ in range(starts)])
        time.sleep(0.5)
        root = pool._zygote._process.pid
        empty = shared_memory(root)
        taken = [pool.take() for _ in range(args.interpreters)]
        begun = time.perf_counter()
        for interpreter in taken:
            assert interpreter.run(STATEMENT).output == "45\n"
        figures["start_all_s"] = time.perf_counter() - begun
        full = shared_memory(root)
        figures["memory_mib"] = full / 2**20
        figures["memory_each_mib"] = (full - empty) / 2**20 / args.interpreters
        say(f"{args.interpreters} interpreters: {figures['memory_mib']:.0f} MiB")
        for interpreter in taken:
            interpreter.close()
    runs = repair_runs(calls // 10, args.isolation)
    close = runs.pop("close")
    seconds = interleaved(runs, calls // 10, warmup=5)
    close()
    for name, values in seconds.items():
        figures[f"repair_{name}_ms"] = 1000 * statistics.median(values)
    figures["repair_over_own_ms"] = figures["repair_sandbox_ms"] - figures["repair_own_ms"]
    say(f"a repaired program's tests cost {figures['repair_over_own_ms']:.2f} ms over a run without a sandbox")
    goals = {"call_over_plain_ms": "<= 5", "start_with_spare_ms": "<= 50", "memory_mib": "<= 2048"}
    report("sandbox", figures, goals, [args.seed], args.quick)


if __name__ == "__main__":
    main()
