"""Playing one turn's actions in an environment, and holding the environment to its contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from rehearsal.agents.protocol import Protocol
from rehearsal.agents.toolbox import Toolbox, ToolResult
from rehearsal.environments.base import TextEnv
from rehearsal.environments.contract import Fault, bad_text, reset_faults, step_faults, told
from rehearsal.errors import EnvironmentFault
from rehearsal.texts import clean_text
from rehearsal.trajectory import ToolCall, Turn, info_success

T = TypeVar("T")

MAX_QUOTED = 40
"""How many characters of an action are quoted back to the agent."""
MAX_LISTED = 20
"""How many legal actions are listed to the agent."""


@dataclass
class PlayResult:
    """What came of one answer.

    Attributes:
        observation: the environment's last words; None if it was not stepped, so that its earlier words still hold.
        executed: the actions that the environment stepped.
        aliases: for each of them the foretold actions that stood for it in that state, as they were foretold.
        rewards: its reward of each.
        penalty: what the harness takes off, the cost of tool calls included; zero or negative.
        terminated: whether the environment reached a final state.
        truncated: whether the environment stopped the episode by a limit of its own.
        success: whether the task is solved, as far as the environment told it; None if it did not.
        state: the environment's last ``info["state"]``; None if it gave none.
        notice: a sentence for the agent about what was wrong with the answer, or "".
        illegal: the action that was refused, or "".
        not_executed: how many actions were left out because of an illegal one before them, or because the actions of
            the episode were used up.
        ineffective: how many executed actions changed nothing, as far as the environment told it.
        foreseeable: whether the observation followed from what the agent had been shown: as far as the environment told
            it, or because nothing was done.
        meaning: of the observation, whatever its words; "" where the environment does not tell it apart.
        parts: what the rewards are made of, by name, as far as the environment told it; summed over the actions.
        violations, obligations: the rules that the actions broke and the duties that they did, as far as the
            environment told it.
        calls: the tool calls of the answer, with what came of them.
        results: what came of them, in the same order.
    """

    observation: str | None = None
    executed: list[str] = field(default_factory=list)
    aliases: list[list[str]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    penalty: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    state: str | None = None
    notice: str = ""
    illegal: str = ""
    not_executed: int = 0
    ineffective: int = 0
    foreseeable: bool = True
    meaning: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    obligations: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the environment ended the episode."""
        return self.terminated or self.truncated


def play_actions(
    env: TextEnv, turn: Turn, protocol: Protocol, remaining_actions: int, toolbox: Toolbox | None = None,
    foretold: Sequence[str] = (),
) -> PlayResult:  # fmt: skip
    """Step the environment through the actions of one answer, or execute the tools that it calls.

    Every action is checked with ``env.parse_action`` before the environment sees it. Actions are executed in order
    until the episode ends, one of them is not legal (it costs ``protocol.format_penalty`` and the rest is left out) or
    ``remaining_actions`` are used up. An answer that could not be read has no actions: it costs the penalty, and the
    environment is not stepped. Nor is it by tool calls, which are no actions: they cost what the toolbox says.

    It changes nothing but environment and tools and takes as long as they do, so it may run in a thread.

    Args:
        env: the environment, in the middle of an episode.
        turn: the answer, as :meth:`rehearsal.agents.agent.Agent.read` filled it in.
        protocol: for the penalty.
        remaining_actions: how many actions the episode has left, at least 1.
        toolbox: the tools of the episode, :attr:`rehearsal.agents.agent.Agent.toolbox`.
        foretold: the actions that predictions were about so far, :attr:`rehearsal.agents.agent.Agent.foretold`. Which
            of them an action is depends on the state that it is taken in, so it is asked here.

    Raises:
        EnvironmentFault: if the environment raises or returns something that its contract does not allow.
    """
    result = PlayResult()
    if not turn.valid:
        result.penalty = protocol.format_penalty
        return result
    if turn.calls:
        if toolbox is None:
            raise ValueError("the answer calls tools, so play_actions needs the agent's toolbox")
        result.calls, result.results = toolbox.play(turn.calls)
        result.foreseeable = False
        result.penalty = -math.fsum(call.cost for call in result.calls)
        return result
    planned = turn.actions[: max(0, remaining_actions)]
    for text in planned:
        action = _parsed(env, text)
        if action is None:
            result.illegal = text
            result.penalty = protocol.format_penalty
            result.notice = _illegal_notice(env, text)
            break
        result.aliases.append([other for other in foretold if other == text or _parsed(env, other) == action])
        _step(env, action, result)
        if result.over:
            break
    result.not_executed = len(turn.actions) - len(result.executed) - bool(result.illegal)
    if result.over:
        # The episode ended before them: nothing was refused.
        result.not_executed = 0
    return result


def check_reset(env: TextEnv, returned: Any) -> tuple[str, dict[str, Any]]:
    """What ``env.reset`` returned, if its contract allows it.

    Raises:
        EnvironmentFault: if not.
    """
    _refuse(reset_faults(f"{_name(env)}.reset", returned))
    observation, info = returned
    return observation, info


def _parsed(env: TextEnv, text: str) -> str | None:
    action: object = _guarded(env, f'parse_action("{_short(text)}")', partial(env.parse_action, text))
    if action is None:
        return None
    if not isinstance(action, str):
        raise EnvironmentFault(f"{_name(env)}.parse_action must return a string or None, not {told(action)}.")
    if bad := bad_text(action):
        raise EnvironmentFault(f"{_name(env)}.parse_action returned {bad}.")
    return action


def _step(env: TextEnv, action: str, result: PlayResult) -> None:
    returned = _guarded(env, f'step("{_short(action)}")', partial(env.step, action))
    _refuse(step_faults(f"{_name(env)}.step", returned))
    observation, reward, terminated, truncated, info = returned
    result.observation = observation
    result.executed.append(action)
    result.rewards.append(float(reward))
    result.terminated, result.truncated = bool(terminated), bool(truncated)
    result.success = info_success(info)
    result.state = str(info["state"]) if info.get("state") is not None else None
    result.ineffective += info.get("effective") is not None and not info["effective"]
    result.foreseeable = result.foreseeable and bool(info.get("foreseeable", False))
    result.meaning = str(info.get("meaning") or "")
    for part, amount in (info.get("parts") or {}).items():
        result.parts[part] = result.parts.get(part, 0.0) + float(amount)
    result.violations += list(info.get("violations") or ())
    result.obligations += list(info.get("obligations") or ())


def _refuse(faults: Iterable[Fault]) -> None:
    for fault in faults:
        raise EnvironmentFault(fault.message)


def check_words(env: TextEnv) -> str:
    """The rules of an environment, if they are text that can be shown.

    Raises:
        EnvironmentFault: if not.
    """
    rules: object = env.instructions
    if not isinstance(rules, str):
        raise EnvironmentFault(f"{_name(env)}.instructions must be a string, not {told(rules)}.")
    if bad := bad_text(rules):
        raise EnvironmentFault(f"{_name(env)}.instructions holds {bad}.")
    return rules


def _guarded(env: TextEnv, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        said = clean_text(" ".join(str(error).split())[:200])
        said = f": {said}" if said else ""
        raise EnvironmentFault(f"{_name(env)}.{what} raised {type(error).__name__}{said}.") from error


def _illegal_notice(env: TextEnv, text: str) -> str:
    legal = _guarded(env, "legal_actions()", env.legal_actions)
    said = f'"{_short(text)}" is not a legal action'
    if not legal:
        return said + "."
    for action in legal:
        if isinstance(action, str) and (bad := bad_text(action)):
            raise EnvironmentFault(f"{_name(env)}.legal_actions() holds {bad}.")
    listed = ", ".join(legal[:MAX_LISTED]) + (", ..." if len(legal) > MAX_LISTED else "")
    return f"{said}; legal: {listed}."


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_QUOTED else line[: MAX_QUOTED - 3] + "..."


def _name(env: TextEnv) -> str:
    return type(env).__name__
