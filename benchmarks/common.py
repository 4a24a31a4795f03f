"""What every benchmark and every experiment shares: the form of a result, and how two things are timed fairly.

A script ends with :func:`report`, which prints one JSON object as the last line and, unless the run was a quick one,
writes the same object to ``results/NAME.json`` beside the script. Scripts in other folders of the repository use it as

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.common import report
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
"""The root of the repository."""


# The form of a result


def met(value: float, bound: str) -> bool:
    """Whether a figure keeps a bound such as ">= 5" or "<= 1.5". A figure that is not a number keeps none.

    Raises:
        ValueError: for a bound of another form.
    """
    relation, _, number = bound.partition(" ")
    if relation not in (">=", "<="):
        raise ValueError(f'a goal is written like ">= 5" or "<= 1.5", not {bound!r}')
    return value >= float(number) if relation == ">=" else value <= float(number)


def report(
    name: str, figures: Mapping[str, float], goals: Mapping[str, str], seeds: Sequence[int], quick: bool, *,
    device: torch.device | None = None, results: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Print a result as one JSON line and, unless it is a quick one, write it to ``results/NAME.json``.

    Args:
        name: of the result; its file is called so.
        figures: numbers by name.
        goals: by name of a figure, the bound that it is held to, such as ">= 5" or "<= 1.5".
        seeds: all seeds that were used.
        quick: a smaller version was run: nothing is written.
        device: where the work was done; the processor if None.
        results: the folder to write to; ``results`` beside the script that runs if None.

    Returns:
        the object with ``name``, ``command``, ``commit``, ``device``, ``seeds``, ``figures``, ``goals`` and ``holds``
        (whether every goal is met). A figure that is not finite becomes null, which meets no goal.

    Raises:
        ValueError: if a goal is set for a figure that is not there.
    """
    unknown = sorted(set(goals) - set(figures))
    if unknown:
        raise ValueError(f"there are goals for figures that were not measured: {', '.join(unknown)}")
    finite = {key: _rounded(float(value)) for key, value in figures.items()}
    values = {key: math.nan if value is None else value for key, value in finite.items()}
    result = {
        "name": name,
        "command": command(),
        "commit": commit(),
        "device": describe_device(device or torch.device("cpu")),
        "seeds": list(seeds),
        "figures": finite,
        "goals": dict(goals),
        "holds": all(met(values[key], bound) for key, bound in goals.items()),
    }
    if not quick:
        folder = results or script_path().parent / "results"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return result


def _rounded(value: float) -> float | None:
    """Six significant digits: more would only show noise."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def script_path() -> Path:
    """The script that runs."""
    return Path(getattr(sys.modules["__main__"], "__file__", None) or sys.argv[0]).resolve()


def command() -> str:
    """How the script was started, with its path from the root of the repository."""
    path = script_path()
    shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return shlex.join(["python", shown, *sys.argv[1:]])


def commit() -> str:
    """The commit that is checked out, with "-dirty" if tracked files other than results differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)*/results/*").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def describe_device(device: torch.device) -> dict[str, Any]:
    """The name of the processor or GPU, the cores that this process may use, and the threads that PyTorch uses."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"name": name, "cores": cores, "threads": torch.get_num_threads()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# Timing


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds that one call takes, to the end of its last kernel."""
    where = device or torch.device("cpu")
    synchronise(where)
    started = time.perf_counter()
    work()
    synchronise(where)
    return time.perf_counter() - started


def interleaved(
    works: Mapping[str, Callable[[], Any]], repeats: int, *, warmup: int = 1, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Time several things in turn, so that whatever else the machine does meets all of them alike.

    Every other round goes backwards: none of them always comes first.

    Returns:
        seconds of each call, by name, in order of the rounds.
    """
    for _ in range(warmup):
        for work in works.values():
            timed(work, device)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats):
        order = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in order:
            seconds[name].append(timed(works[name], device))
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times larger one measurement is than another.

    Attributes:
        median: the ratio of the medians.
        low, high: the smallest and largest ratio of two measurements of the same round.
    """

    median: float
    low: float
    high: float

    def figures(self, name: str) -> dict[str, float]:
        """The figures NAME, NAME_low and NAME_high."""
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratio of two interleaved measurements, round by round."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(above) / statistics.median(below), min(rounds), max(rounds))


# The command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parsed = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parsed.add_argument("--quick", action="store_true", help="a smaller version in about a minute, into no file")
    parsed.add_argument("--threads", type=int, default=None, help="threads of PyTorch; one for each core if left out")
    parsed.add_argument("--seed", type=int, default=0, help="of tasks, weights and sampling")
    return parsed


def say(text: str) -> None:
    """Tell on the error stream how far a benchmark is; the output stream is for the result."""
    print(text, file=sys.stderr, flush=True)


# Memory


def in_own_process(options: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the same script with other options in a process of its own, and read the JSON object that it prints last.

    Args:
        options: of the script.
        environment: variables that the process has besides.

    Raises:
        SystemExit: with the last line of what went wrong.
    """
    done = subprocess.run(
        [sys.executable, str(script_path()), *options], capture_output=True, text=True, check=False,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{shlex.join(options)} failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most so far.

    Not from ``getrusage``: on Linux its maximum begins with that of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise SystemExit("The memory of a process is read from /proc, which this system does not have.") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let "VmHWM" begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
