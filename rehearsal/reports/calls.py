"""Tool calls as a report shows them: what was called with what, what came of it, and what could not be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rehearsal.agents.calls import CALL_OPEN, parse_calls
from rehearsal.agents.protocol import THINK_CLOSE, THINK_OPEN, Protocol
from rehearsal.trajectory import ToolCall, Trajectory, Turn

ERRORS: Mapping[str, str] = {
    "unknown": "no such tool",
    "arguments": "wrong arguments",
    "raised": "the tool failed",
    "timeout": "took too long",
    "busy": "still busy",
    "limit": "no calls left",
}
"""Kinds of failure (:class:`rehearsal.trajectory.ToolCall`) for people."""

UNREAD = "the episode ended before the agent could read it"
"""Of the results of an episode's last calls."""

_SHORT = 80
_ANSWER_FORMAT = Protocol()

Use = Literal["", "none", "fine", "failed"]


@dataclass(frozen=True)
class Argument:
    """One argument of a call.

    Attributes:
        name: of the argument.
        text: its value: strings as they are, unless they could be taken for something else, other values as JSON.
        long: whether it needs lines of its own.
    """

    name: str
    text: str
    long: bool


@dataclass(frozen=True)
class CallView:
    """A call that could be read.

    Attributes:
        tool: its name, as the agent wrote it.
        arguments: in the order in which the agent wrote them.
        result: what the agent was told.
        error: what went wrong, in words; "" if nothing did.
        answered: whether anything came back.
        cost: what it took off the reward.
    """

    tool: str
    arguments: Sequence[Argument]
    result: str
    error: str
    answered: bool
    cost: float


@dataclass(frozen=True)
class BrokenCall:
    """A call that could not be read.

    Attributes:
        text: the answer behind its thought, as it was written.
        problem: what is wrong, as what an answer can *have*; "" where the call could be read and none was expected.
    """

    text: str
    problem: str


def call_views(turn: Turn) -> list[CallView]:
    """The calls of an answer, in order."""
    return [_view(call) for call in turn.calls]


def broken_call(turn: Turn) -> BrokenCall | None:
    """The call that an answer tried to make; None if it made none, or one that could be read."""
    if turn.valid or turn.actions or turn.calls:
        return None
    text = _ANSWER_FORMAT.without_end(turn.response)
    before, closed, after = text.partition(THINK_CLOSE)
    if not closed and (turn.thought or before.startswith(THINK_OPEN)):
        return None  # a thought that never ended: there is no answer
    text = (after if closed else before).strip()
    if CALL_OPEN not in text:
        return None
    return BrokenCall(text, parse_calls(text).problem)


def told_above(turns: Sequence[Turn], place: int) -> bool:
    """Whether what the agent saw at the start of a turn is the results of its last calls, and nothing else: they are
    shown with their calls."""
    calls = turns[place - 1].calls if place else ()
    return bool(calls) and all(call.result in turns[place].observation for call in calls)


def use_of(trajectory: Trajectory) -> Use:
    """How an episode used its tools: "" if it had none, else whether it called none, one failed, or all went well."""
    calls = [call for turn in trajectory.turns for call in turn.calls]
    if calls:
        return "failed" if any(call.error for call in calls) else "fine"
    return "none" if any(name.startswith("tool_calls/") for name in trajectory.counters) else ""


def call_counts(trajectory: Trajectory) -> tuple[int, int]:
    """Calls of an episode, and those that failed."""
    calls = [call for turn in trajectory.turns for call in turn.calls]
    return len(calls), sum(bool(call.error) for call in calls)


def spell_argument(value: Any) -> str:
    """A value of an argument: strings without quotes, unless they could be taken for another value or for nothing."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    if value != value.strip() or not value or _reads_as_json(value):
        return json.dumps(value, ensure_ascii=False)
    return value


def _view(call: ToolCall) -> CallView:
    arguments = []
    for name, value in call.arguments.items():
        # Lines stay lines, whatever blanks are around them.
        text = value if isinstance(value, str) and "\n" in value.strip() else spell_argument(value)
        arguments.append(Argument(name, text, "\n" in text or len(text) > _SHORT))
    error = ERRORS.get(call.error, call.error)
    return CallView(call.name, arguments, call.result, error, bool(call.result or call.error), call.cost)


def _reads_as_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
