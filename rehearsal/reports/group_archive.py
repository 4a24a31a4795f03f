"""Every group of every saved training step, small enough to travel inside the report.

For each step the rewards of all groups and why the filter kept or dropped them, and their episodes in full. A step is
one compressed block of JSON, which the page unpacks when somebody asks for it. Where all blocks together would be
larger than the budget, steps are left out evenly, and the page says which.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rehearsal.algorithms.variance import group_variance
from rehearsal.errors import CheckpointError
from rehearsal.reports.calls import BrokenCall, CallView, broken_call, call_views, told_above
from rehearsal.reports.turn_rewards import made_of
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import read_table, read_trajectories
from rehearsal.trajectory import Group, Trajectory, Turn, rewards_matrix

BYTES_BUDGET = 4_000_000
"""Of all blocks, as they stand in the page."""
TEXT_LIMIT = 4_000
"""Characters of one text; the rest is in the trajectory file."""


@dataclass(frozen=True)
class GroupArchive:
    """What the page's browser of groups opens.

    Attributes:
        blocks: by step, deflated JSON in base64.
        recorded: how many training steps have recorded episodes.
    """

    blocks: dict[int, str]
    recorded: int

    @property
    def complete(self) -> bool:
        return len(self.blocks) == self.recorded


def pack_groups(run: RunFolder, problems: list[str], budget: int = BYTES_BUDGET) -> GroupArchive:
    """Pack the training episodes of a run. Files that cannot be read are left out, with a sentence in ``problems``."""
    files = run.trajectory_files("train")
    steps = sorted(files)
    blocks: dict[int, str] = {}
    used = 0
    # First the last step, the first, and then halves of halves: wherever the budget ends, what is in lies evenly.
    for step in _spread_order(steps):
        try:
            groups = read_trajectories(files[step])
            kept, reasons = _filtering(files[step], groups)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        block = _pack(_step(groups, kept, reasons))
        if used + len(block) > budget and blocks:
            break
        blocks[step] = block
        used += len(block)
    return GroupArchive(dict(sorted(blocks.items())), len(steps))


def unpack(block: str) -> Any:
    """What :func:`pack_groups` packed, as the page's script reads it."""
    return json.loads(zlib.decompress(base64.b64decode(block)))


def _pack(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("utf-8", "backslashreplace"), 9)).decode("ascii")


def _spread_order(steps: Sequence[int]) -> list[int]:
    if len(steps) < 3:
        return list(reversed(steps))
    order = [steps[-1], steps[0]]
    spans = [(0, len(steps) - 1)]
    while spans:
        low, high = spans.pop(0)
        if high - low < 2:
            continue
        middle = (low + high) // 2
        order.append(steps[middle])
        spans += [(low, middle), (middle, high)]
    return order


def _filtering(file: Any, groups: Sequence[Group]) -> tuple[list[bool], list[str]]:
    """For each episode whether the policy learned from it, and for each group why; where that was not recorded, yes
    and ""."""
    count = sum(map(len, groups))
    try:
        table = read_table(file, ["kept", "filter_reason"])
        kept, reasons = table.column("kept").to_pylist(), table.column("filter_reason").to_pylist()
    except CheckpointError:
        kept, reasons = [True] * count, [""] * count
    first, place = [], 0
    for group in groups:
        first.append(str(reasons[place]) if len(group) else "")
        place += len(group)
    return [bool(one) for one in kept], first


def _step(groups: Sequence[Group], kept: Sequence[bool], reasons: Sequence[str]) -> list[dict[str, Any]]:
    variance_P = group_variance(rewards_matrix(groups))
    place = 0
    packed = []
    for number, (group, reason) in enumerate(zip(groups, reasons, strict=True)):
        members = kept[place : place + len(group)]
        place += len(group)
        packed.append(
            {
                "n": number,
                "why": reason,
                "var": _number(float(variance_P[number])),
                "episodes": [_episode(one, keep) for one, keep in zip(group, members, strict=True)],
            }
        )
    return packed


def _episode(trajectory: Trajectory, kept: bool) -> dict[str, Any]:
    result = "failed" if trajectory.failed else {True: "solved", False: "unsolved", None: "open"}[trajectory.success]
    return {
        "kept": kept,
        "result": result,
        "reward": _number(trajectory.reward),
        "stop": trajectory.stop_reason.value,
        "error": trajectory.error,
        "end": _cut(trajectory.final_observation),
        "turns": [_turn(turn, told_above(trajectory.turns, place)) for place, turn in enumerate(trajectory.turns)],
    }


def _turn(turn: Turn, above: bool) -> dict[str, Any]:
    packed: dict[str, Any] = {
        # Results of calls stand with their calls.
        "o": None if above else _cut(turn.observation),
        "n": _cut(turn.notice),
        "t": _cut(turn.thought),
        "a": [_cut(action) for action in turn.actions],
        "x": len(turn.executed),
        "v": turn.valid,
        "r": _number(turn.reward),
    }
    if told := made_of(turn):
        packed["m"] = _cut(told)
    if turn.calls:
        packed["c"] = [_call(call) for call in call_views(turn)]
    elif broken := broken_call(turn):
        packed["b"] = _broken(broken)
    return packed


def _call(call: CallView) -> dict[str, Any]:
    return {
        "n": _cut(call.tool),
        "a": [[_cut(one.name), _cut(one.text), int(one.long)] for one in call.arguments],
        "r": _cut(call.result) if call.answered else None,
        "e": call.error,
    }


def _broken(call: BrokenCall) -> list[str]:
    return [_cut(call.text), call.problem]


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …"
