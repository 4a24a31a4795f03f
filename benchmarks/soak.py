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
- memory is flat: the upper end of the 95% interval of its slope over the second half of the rounds. ``used`` and
  ``blocks`` are what somebody holds in this process, by the C library's and by Python's own allocator. ``rss`` is what
  it occupies, holes included. The largest process of each kind below this one is watched in as many rounds again, in
  which nothing fails and nobody kills: before that hardly one lives for long enough.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import parser, report, say
from benchmarks.soak_account import Account
from benchmarks.soak_faults import (
    ENVIRONMENT_FAULTS,
    TOOL_FAULTS,
    WORDS,
    BreakingCalculate,
    BreakingTasks,
    Dice,
    Doze,
    Plan,
    ScriptedEngine,
    brittle,
    leave,
    ledger,
)
from benchmarks.soak_state import KINDS, Chaos, State, processes_below, settled, slope
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
from rehearsal.trajectory import Trajectory, all_trajectories

GROUP = 4
_STEP, _TOOL, _CHECK, _CODE = 20.0, 2.0, 2.0, 1.0
"""Seconds that a step of an environment, a call of a tool, a check of a verifier and a call of Python may take."""
_INSIDE = "REHEARSAL_SOAK_FOLDER"


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
    dice.rate = 0.0
    calm: list[tuple[int, State]] = []
    for number in range(rounds, 2 * rounds):
        for trajectory in played.play(number, groups):
            account.add(trajectory, _plans(played), dice)
        _forget(played)
        calm.append((account.episodes, settled(folder)))
        say(f"{account.episodes} episodes, nothing failing: {calm[-1][1]}")
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
    return figures_of(account, chaos, states, calm, begin, left, took, 2 * rounds * groups * GROUP * 2)


def _plans(played: Soak) -> dict[int, Plan]:
    return played.engines[0].plans | played.engines[1].plans


def _forget(played: Soak) -> None:
    for engine in played.engines:
        engine.plans.clear()


def figures_of(
    account: Account, chaos: Chaos, states: Sequence[tuple[int, State]], calm: Sequence[tuple[int, State]],
    begin: State, left: dict[str, int], took: float, wanted: int,
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
    warm = states[len(states) // 2 :]
    figures["rss_mib"], figures["rss_begin_mib"] = warm[-1][1].rss / 2**20, begin.rss / 2**20
    figures["below_most_mib"] = max(state.below for _, state in warm) / 2**20
    if len(warm) >= 3:
        measured = {name: [(count, float(getattr(state, name))) for count, state in warm] for name in ("rss", "used")}
        for kind in KINDS:
            known = [(count, float(state.each[kind])) for count, state in calm if state.each.get(kind)]
            measured[kind] = known[len(known) // 2 :]
        for name, points in measured.items():
            if len(points) >= 3:
                rise, half = slope([value / 1024 for _, value in points], [float(count) for count, _ in points])
                figures[f"{name}_slope_kib"], figures[f"{name}_slope_kib_high"] = rise, rise + half
        rise, half = slope([float(state.blocks) for _, state in warm], [float(count) for count, _ in warm])
        figures["blocks_slope"], figures["blocks_slope_high"] = rise, rise + half
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--episodes", type=int, help="with faults, and as many without; 2,000 if left out, 96 with --quick"
    )
    options.add_argument("--rate", type=float, default=None, help="of each fault")
    options.add_argument("--every", type=float, default=1.5, help="seconds between kills from outside, on average")
    options.add_argument("--patience", type=float, default=1.0, help="times all limits, for a machine that is busy")
    args = options.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        say("The soak reads /proc, which this system does not have.")
        raise SystemExit(2)
    if _INSIDE not in os.environ:
        raise SystemExit(_supervised())
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGTERM)
    episodes = args.episodes or (96 if args.quick else 2000)
    rounds = max(1, episodes // (48 if args.quick else 80))
    groups = max(1, episodes // rounds // (2 * GROUP))
    rate = args.rate if args.rate is not None else 0.03 if args.quick else 0.015
    figures = soak(rounds, groups, rate, args.seed, args.every, args.patience, Path(os.environ[_INSIDE]))
    nothing = ("missing", "unaccounted", "unexplained", "silent_faults", "wrong_results",
               *(f"left_{name}" for name in ("children", "threads", "descriptors", "files")))  # fmt: skip
    goals = dict.fromkeys(nothing, "<= 0")
    if not args.quick:
        goals |= {"episodes": f">= {2 * episodes}", "below_most_mib": "<= 1024", "rss_slope_kib_high": "<= 8",
                  "used_slope_kib_high": "<= 4", "blocks_slope_high": "<= 8"}  # fmt: skip
        kinds = [kind for kind in KINDS if kind != "server" or importlib.util.find_spec("mcp") is not None]
        for kind in kinds:
            figures.setdefault(f"{kind}_slope_kib_high", math.nan)  # what was not seen is not shown to be flat
        goals |= {f"{kind}_slope_kib_high": "<= 4" for kind in kinds}
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
