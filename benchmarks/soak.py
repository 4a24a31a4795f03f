"""A soak: thousands of tool episodes while tools crash, verifiers hang and processes are killed from outside.

Half of the episodes are played in ``calculate``, half in ``tasks`` with a verifier in its pool of processes; all agents
have Python in the sandbox, search, a calculator, functions of a user's own and, where the SDK is installed, the tools
of an MCP server over stdio. The agent is scripted, so that it is known which fault is in which episode (see
``soak_faults.py``); everything else is what training uses. Beside the faults of the plans a thread sends SIGKILL to
processes of the sandbox, to those of verifiers and to the MCP server, at random moments.

What must hold at the end:

- every task has all its episodes, each with a stop reason, those that failed with an error and no reward, and those
  that did not with the right answer: ``unaccounted`` and ``unexplained`` count those that do not. An episode may fail
  beside the plan only because a verifier's process was killed from outside, and not more often than that happened.
- every fault of a plan shows in its episode, as the kind of error that it is: ``silent_faults``.
- no result of a tool is wrong: ``wrong_results``. Interpreters are asked what they hold of other episodes.
- processes, threads, descriptors and files are what they were at the beginning. Orphans count too: the script runs
  under a process that inherits them.
- memory is flat: the upper end of the 95% interval of its slope over the rounds after the first quarter.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import memory, parser, report, say
from benchmarks.sandbox import shared_memory
from benchmarks.soak_faults import (
    ENVIRONMENT_FAULTS,
    TOOL_FAULTS,
    WORDS,
    BreakingCalculate,
    BreakingTasks,
    Dice,
    Doze,
    Move,
    Plan,
    ScriptedEngine,
    brittle,
    leave,
    ledger,
)
from benchmarks.soak_verifier import FAULTS as VERIFIER_FAULTS
from rehearsal.agents.agent import Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.toolbox import FunctionTools, Toolkit, ToolLimits
from rehearsal.agents.toolkit.calculator import Calculator
from rehearsal.agents.toolkit.mcp import Mcp
from rehearsal.agents.toolkit.python import Python
from rehearsal.agents.toolkit.search import Search
from rehearsal.agents.tools import tool_from
from rehearsal.environments.tasks import close_pools
from rehearsal.models.chat import ChatRenderer
from rehearsal.models.load import load_policy
from rehearsal.rollout import Rollout, Task, run_coroutine
from rehearsal.sandbox.inside import libc, processes
from rehearsal.trajectory import StopReason, ToolCall, Trajectory, all_trajectories

GROUP = 4
_SECONDS_TO_SETTLE = 60.0
_STEP, _TOOL, _CHECK, _CODE = 20.0, 2.0, 2.0, 1.0
"""Seconds that a step of an environment, a call of a tool, a check of a verifier and a call of Python may take."""
_YOUNG = 3.0
"""Seconds for which the MCP server is left in peace."""
_INSIDE = "REHEARSAL_SOAK_FOLDER"
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
        rss: bytes of memory.
        below: bytes of memory of all processes below, shared pages divided by their users.
        children: processes below this one and orphans of theirs.
        threads, descriptors: their numbers.
        files: in the folder for temporary files.
    """

    rss: int
    below: int
    children: int
    threads: int
    descriptors: int
    files: int

    @classmethod
    def now(cls, folder: Path) -> State:
        gc.collect()
        return cls(
            memory("VmRSS"), shared_memory(os.getpid()) - memory_of_this(),
            len(processes_below(os.getppid())) - 1, len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")), len(list(folder.iterdir())),
        )  # fmt: skip

    def beyond(self, other: State) -> dict[str, int]:
        """What there is more of than in another state, memory apart."""
        names = ("children", "threads", "descriptors", "files")
        return {name: max(0, getattr(self, name) - getattr(other, name)) for name in names}


def memory_of_this() -> int:
    """Proportional memory of this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


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


# What became of the episodes


@dataclass
class Account:
    """What became of the episodes.

    Attributes:
        stops: episodes by stop reason.
        planned: faults by name, of those that the episode came to.
        silent: of these, the ones that left no trace.
        collateral: failures that no plan has, by what failed.
        problems: sentences about what cannot be.
    """

    episodes: int = 0
    turns: int = 0
    calls: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    planned: Counter[str] = field(default_factory=Counter)
    silent: Counter[str] = field(default_factory=Counter)
    collateral: Counter[str] = field(default_factory=Counter)
    unaccounted: int = 0
    unexplained: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, trajectory: Trajectory, plans: dict[int, Plan], dice: Dice) -> None:
        """Take in an episode."""
        self.episodes += 1
        self.turns += len(trajectory.turns)
        reason = trajectory.stop_reason
        self.stops[reason.value if reason is not None else "none"] += 1
        failed = reason in (StopReason.ERROR, StopReason.TIMEOUT)
        sound = not trajectory.error and not math.isnan(trajectory.reward)
        if reason is None or (failed and (not trajectory.error or not math.isnan(trajectory.reward))):
            self._problem("unaccounted", trajectory, "has no stop reason, no error or a reward that it cannot have")
            return
        if not failed and not sound:
            self._problem("unaccounted", trajectory, f"has the error {trajectory.error!r}")
            return
        fault = dice.environment_fault(trajectory.seed, trajectory.sample)
        plan = self._plan(trajectory, plans)
        for turn, move in zip(trajectory.turns, plan.moves if plan is not None else (), strict=False):
            for call in turn.calls:
                self._call(trajectory, move, call)
        if fault:
            self._fatal(trajectory, fault, (StopReason.TIMEOUT,) if "hangs" in fault else (StopReason.ERROR,), ())
        elif plan is not None and plan.fault:
            self._fatal(trajectory, plan.fault, (StopReason.ERROR,), (*VERIFIER_FAULTS[plan.fault], "crash"))
        elif failed:
            # Only a verifier's process that was killed from outside takes an episode with it.
            if reason == StopReason.ERROR and "could not be checked (crash)" in trajectory.error:
                self.collateral["verifier"] += 1
            else:
                self._problem("unexplained", trajectory, f"failed with {trajectory.error!r}")
        elif reason != StopReason.TERMINATED or trajectory.reward != 1.0 or trajectory.success is not True:
            self._problem("unexplained", trajectory, f"ended with {reason} and {trajectory.reward}")

    def _plan(self, trajectory: Trajectory, plans: dict[int, Plan]) -> Plan | None:
        """The plan of an episode, which its first call names."""
        if not trajectory.turns or not trajectory.turns[0].calls:
            return None
        return plans.pop(int(trajectory.turns[0].calls[0].arguments["entry"]))

    def _call(self, trajectory: Trajectory, move: Move, call: ToolCall) -> None:
        self.calls += 1
        if move.fault:
            self.planned[move.fault] += 1
            kind = TOOL_FAULTS[move.fault][1]
            lost = call.error and move.tool in ("python", "die", "stall")  # something else was faster
            if call.error != kind and not lost:
                self.silent[move.fault] += 1
                self.problems.append(f"{move.fault}: {call}")
        elif call.error:
            # What was killed from outside, or had been left by a call before, cannot answer.
            if move.tool in ("python", "double"):
                self.collateral[move.tool] += 1
            else:
                self._problem("unexplained", trajectory, f"{call}")
        elif not call.result.endswith(move.expected):
            self._problem("wrong", trajectory, f"{call} instead of {move.expected}")

    def _fatal(self, trajectory: Trajectory, fault: str, reasons: Sequence[StopReason], kinds: Sequence[str]) -> None:
        self.planned[fault] += 1
        as_meant = trajectory.stop_reason in reasons
        if kinds and not any(f"could not be checked ({kind})" in trajectory.error for kind in kinds):
            as_meant = False
        if not as_meant:
            self.silent[fault] += 1
            self.problems.append(f"{fault}: {trajectory.stop_reason} {trajectory.error}")

    def _problem(self, which: str, trajectory: Trajectory, what: str) -> None:
        setattr(self, which, getattr(self, which) + 1)
        self.problems.append(f"{trajectory.environment} {trajectory.seed}/{trajectory.sample}: {what}")


# The soak


class Soak:
    """Two rollouts, one in each environment, and the tools that both have."""

    def __init__(self, renderer: ChatRenderer, dice: Dice, own: Path, seed: int, patience: float) -> None:
        self.engines = [ScriptedEngine(renderer, dice, verified) for verified in (False, True)]
        source = own / "tasks.jsonl"
        if not source.exists():
            source.write_text("".join(f"{json.dumps(row)}\n" for row in arithmetic(seed)))
        hang = patience * _STEP + 2.0

        def calculate() -> BreakingCalculate:
            return BreakingCalculate(dice, hang)

        def tasks() -> BreakingTasks:
            return BreakingTasks(
                dice, hang, source=str(source), verifier="benchmarks.soak_verifier:Moody", timeout=patience * _CHECK
            )

        limits = Limits(max_turns=12, max_actions=1, max_tokens_per_turn=400, max_context=16_000)
        protocol = Protocol(thinking=False)
        self.rollouts = [
            Rollout(
                make, engine, renderer, protocol, limits, seed=2 * seed + number, step_timeout=patience * _STEP,
                toolkit=kit,
            )
            for number, (make, engine, kit) in enumerate(
                zip((calculate, tasks), self.engines, toolkits(dice, patience), strict=True)
            )
        ]  # fmt: skip

    def play(self, number: int, groups: int) -> list[Trajectory]:
        """Play a round: so many groups in each environment, both at the same time."""

        async def both() -> list[Any]:
            return list(await asyncio.gather(*(
                rollout.play_async([Task(number * 10_000 + place) for place in range(groups)], GROUP, step=number)
                for rollout in self.rollouts
            )))  # fmt: skip

        played = run_coroutine(both())
        for found in played:
            if [len(group.trajectories) for group in found] != [GROUP] * groups:
                raise SystemExit("A group is not complete.")
        return [trajectory for found in played for trajectory in all_trajectories(found)]

    def close(self) -> None:
        for rollout in self.rollouts:
            rollout.close()
        close_pools()


def toolkits(dice: Dice, patience: float) -> list[Toolkit]:
    """What agents have in the two environments; one server and one pool of interpreters for each."""
    facts = [{"title": word, "text": f"the token of {word} is {7 * place}."} for place, word in enumerate(WORDS)]
    doze = tool_from(Doze(3 * patience * _TOOL).doze)
    made = []
    for _ in range(2):
        sources: list[Any] = [
            FunctionTools(ledger, brittle, leave, doze), Calculator(), Search(facts),
            Python(seconds=patience * _CODE, memory_mib=64),
        ]  # fmt: skip
        if dice.server:
            server = Path(__file__).resolve().parent / "soak_server.py"
            sources.append(Mcp([sys.executable, str(server)], start_timeout=120.0))
        made.append(Toolkit(sources, ToolLimits(timeout=patience * _TOOL)))
    return made


def arithmetic(seed: int, count: int = 400) -> list[dict[str, str]]:
    """Tasks with an answer that can be checked."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        a, b, c = (rng.randrange(10, 1000) for _ in range(3))
        rows.append({"prompt": f"Task {number}: what is {a} * {b} + {c}", "reference": str(a * b + c)})
    return rows


def soak(
    rounds: int, groups: int, rate: float, seed: int, seconds: float, patience: float, folder: Path
) -> dict[str, float]:
    """All of it; the figures."""
    renderer = load_policy("base", device="cpu").renderer
    server = importlib.util.find_spec("mcp") is not None
    own = folder / "own"
    own.mkdir()
    # Once through everything, so that what is loaded once is loaded.
    first = Soak(renderer, Dice(0.0, server), own, seed, patience)
    account = Account()
    for trajectory in first.play(9_999, 2):
        account.add(trajectory, {**first.engines[0].plans, **first.engines[1].plans}, Dice(0.0, server))
    first.close()
    if account.problems or account.collateral:
        raise SystemExit(f"Without faults something fails: {account.problems or account.collateral}")
    time.sleep(1.0)
    begin = State.now(folder)
    say(f"at the beginning: {begin}")

    dice, account = Dice(rate, server), Account()
    played = Soak(renderer, dice, own, seed, patience)
    chaos = Chaos(seed, seconds, patience)
    states: list[tuple[int, State]] = []
    begun = time.monotonic()
    for number in range(rounds):
        for trajectory in played.play(number, groups):
            account.add(trajectory, _plans(played), dice)
        _forget(played)
        with chaos.quiet():
            states.append((account.episodes, settled(folder)))
        say(f"{account.episodes} episodes, {time.monotonic() - begun:.0f} s: {states[-1][1]}; {dict(chaos.kills)}")
    chaos.stop()
    took = time.monotonic() - begun
    played.close()
    del played
    end = settled(folder, begin)
    say(f"at the end: {end}")
    left = end.beyond(begin)
    if left["children"]:
        say(f"left: {processes_below(os.getppid())}")
    if left["threads"]:
        say(f"left: {sorted(thread.name for thread in threading.enumerate())}")
    for problem in account.problems[:50]:
        say(problem)
    return figures_of(account, chaos, states, begin, left, took, rounds * groups * GROUP * 2)


def _plans(played: Soak) -> dict[int, Plan]:
    return played.engines[0].plans | played.engines[1].plans


def _forget(played: Soak) -> None:
    for engine in played.engines:
        engine.plans.clear()


def figures_of(
    account: Account, chaos: Chaos, states: Sequence[tuple[int, State]], begin: State, left: dict[str, int],
    took: float, wanted: int,
) -> dict[str, float]:  # fmt: skip
    """The numbers of the result."""
    beyond_kills = max(0, account.collateral["verifier"] - chaos.kills["verifier"])
    figures: dict[str, float] = {
        "episodes": account.episodes, "missing": wanted - account.episodes, "unaccounted": account.unaccounted,
        "unexplained": account.unexplained + beyond_kills, "silent_faults": sum(account.silent.values()),
        "wrong_results": account.wrong, "turns": account.turns, "calls": account.calls, "seconds": took,
    }  # fmt: skip
    figures |= {f"stop/{name}": count for name, count in sorted(account.stops.items())}
    names = [*TOOL_FAULTS, *VERIFIER_FAULTS, *ENVIRONMENT_FAULTS]
    figures |= {f"fault/{name}": account.planned[name] for name in names if account.planned[name]}
    figures |= {f"killed/{name}": chaos.kills[name] for name in KINDS}
    figures |= {f"hit_by_others/{name}": count for name, count in sorted(account.collateral.items())}
    figures |= {f"left_{name}": count for name, count in left.items()}
    warm = states[len(states) // 4 :]
    figures["rss_mib"], figures["rss_begin_mib"] = warm[-1][1].rss / 2**20, begin.rss / 2**20
    figures["below_mib"] = warm[-1][1].below / 2**20
    figures["below_most_mib"] = max(state.below for _, state in warm) / 2**20
    if len(warm) >= 3:
        measures: dict[str, Callable[[State], float]] = {"rss": lambda s: s.rss, "below": lambda s: s.below}
        for name, measure in measures.items():
            rise, half = slope([measure(state) / 1024 for _, state in warm], [float(count) for count, _ in warm])
            figures[f"{name}_slope_kib"], figures[f"{name}_slope_kib_high"] = rise, rise + half
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--episodes", type=int, default=None, help="2,000 if left out; 96 with --quick")
    options.add_argument("--rate", type=float, default=None, help="of each fault")
    options.add_argument("--every", type=float, default=1.5, help="seconds between kills from outside, on average")
    options.add_argument("--patience", type=float, default=1.0, help="times all limits, for a machine that is busy")
    args = options.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        say("The soak reads /proc, which this system does not have.")
        raise SystemExit(2)
    if _INSIDE not in os.environ:
        raise SystemExit(_supervised())
    episodes = args.episodes or (96 if args.quick else 2000)
    rounds = max(1, episodes // (48 if args.quick else 80))
    groups = max(1, episodes // rounds // (2 * GROUP))
    rate = args.rate if args.rate is not None else 0.03 if args.quick else 0.015
    figures = soak(rounds, groups, rate, args.seed, args.every, args.patience, Path(os.environ[_INSIDE]))
    nothing = ("missing", "unaccounted", "unexplained", "silent_faults", "wrong_results",
               *(f"left_{name}" for name in ("children", "threads", "descriptors", "files")))  # fmt: skip
    goals = dict.fromkeys(nothing, "<= 0")
    if not args.quick:
        goals |= {"episodes": ">= 2000", "rss_slope_kib_high": "<= 4", "below_slope_kib_high": "<= 4"}
    report("soak", figures, goals, [args.seed], args.quick)


def _supervised() -> int:
    """Run this script below a process that inherits orphans, with a folder of its own for temporary files."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="rehearsal-soak-") as folder:
        os.chmod(folder, 0o755)
        script = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "TMPDIR": folder, _INSIDE: folder})
        while True:
            pid, status = os.wait()  # orphans too
            if pid == script.pid:
                script.returncode = os.waitstatus_to_exitcode(status)
                break
        processes.kill_below(os.getpid())
    return script.returncode


if __name__ == "__main__":
    main()
