"""What became of the episodes of the soak, and whether that is what must have become of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.soak_faults import TOOL_FAULTS, Dice, Move, Plan
from benchmarks.soak_verifier import FAULTS as VERIFIER_FAULTS
from rehearsal.trajectory import StopReason, ToolCall, Trajectory


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
            # A second call of what hangs already is not even begun.
            if call.error not in (kind, "busy" if kind == "timeout" else kind) and not lost:
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
