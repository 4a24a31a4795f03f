"""Playing one turn's actions in an environment, and holding the environment to its contract."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from rehearsal.agents.protocol import Protocol
from rehearsal.agents.toolbox import Toolbox, ToolResult
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault
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
    env: TextEnv, turn: Turn, protocol: Protocol, remaining_actions: int, toolbox: Toolbox | None = None
) -> PlayResult:
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
        action = _guarded(env, f'parse_action("{_short(text)}")', partial(env.parse_action, text))
        if action is not None and not isinstance(action, str):
            raise EnvironmentFault(f"{_name(env)}.parse_action must return a string or None, not {_told(action)}.")
        if action is None:
            result.illegal = text
            result.penalty = protocol.format_penalty
            result.notice = _illegal_notice(env, text)
            break
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
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise EnvironmentFault(f"{_name(env)}.reset must return (observation, info), not {_told(returned)}.")
    observation, info = returned
    return _observation(env, "reset", observation), _info(env, "reset", info)


def _step(env: TextEnv, action: str, result: PlayResult) -> None:
    returned = _guarded(env, f'step("{_short(action)}")', partial(env.step, action))
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise EnvironmentFault(
            f"{_name(env)}.step must return (observation, reward, terminated, truncated, info), not {_told(returned)}."
        )
    observation, reward, terminated, truncated, info = returned
    observation = _observation(env, "step", observation)
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise EnvironmentFault(f"{_name(env)}.step must return a finite number as reward, not {_told(reward)}.")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            raise EnvironmentFault(f"{_name(env)}.step must return True or False as {name}, not {_told(flag)}.")
    info = _info(env, "step", info)
    result.observation = observation
    result.executed.append(action)
    result.rewards.append(float(reward))
    result.terminated, result.truncated = bool(terminated), bool(truncated)
    result.success = info_success(info)
    result.state = str(info["state"]) if info.get("state") is not None else None
    result.ineffective += info.get("effective") is not None and not info["effective"]
    result.foreseeable = result.foreseeable and bool(info.get("foreseeable", False))
    result.meaning = str(info.get("meaning") or "")
    for part, amount in _parts(env, info).items():
        result.parts[part] = result.parts.get(part, 0.0) + amount
    result.violations += _names(env, info, "violations")
    result.obligations += _names(env, info, "obligations")


def _parts(env: TextEnv, info: dict[str, Any]) -> dict[str, float]:
    """``info["parts"]``, if its contract allows it."""
    parts = info.get("parts") or {}
    if not isinstance(parts, Mapping):
        raise EnvironmentFault(f'info["parts"] of {_name(env)}.step must be numbers by name, not {_told(parts)}.')
    for name, amount in parts.items():
        if not isinstance(name, str) or not isinstance(amount, numbers.Real) or not math.isfinite(amount):
            raise EnvironmentFault(
                f'info["parts"] of {_name(env)}.step must be finite numbers by name, not {_told(amount)} for '
                f"{_told(name)}."
            )
    return {name: float(amount) for name, amount in parts.items()}


def _names(env: TextEnv, info: dict[str, Any], key: str) -> list[str]:
    """A list of names in ``info``, if its contract allows it."""
    names = info.get(key) or []
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise EnvironmentFault(f'info["{key}"] of {_name(env)}.step must be a list of names, not {_told(names)}.')
    return list(names)


def _observation(env: TextEnv, where: str, observation: object) -> str:
    if not isinstance(observation, str):
        raise EnvironmentFault(f"{_name(env)}.{where} must return a string as observation, not {_told(observation)}.")
    return observation


def _info(env: TextEnv, where: str, info: object) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise EnvironmentFault(f"{_name(env)}.{where} must return a dict as info, not {_told(info)}.")
    return info


def _guarded(env: TextEnv, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        told = " ".join(str(error).split())
        told = f": {told[:200]}" if told else ""
        raise EnvironmentFault(f"{_name(env)}.{what} raised {type(error).__name__}{told}.") from error


def _illegal_notice(env: TextEnv, text: str) -> str:
    legal = _guarded(env, "legal_actions()", env.legal_actions)
    said = f'"{_short(text)}" is not a legal action'
    if not legal:
        return said + "."
    listed = ", ".join(legal[:MAX_LISTED]) + (", ..." if len(legal) > MAX_LISTED else "")
    return f"{said}; legal: {listed}."


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_QUOTED else line[: MAX_QUOTED - 3] + "..."


def _name(env: TextEnv) -> str:
    return type(env).__name__


def _told(value: object) -> str:
    """A value and its type, short enough for a sentence."""
    if value is None:
        return "None"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a broken __repr__ must not hide what is wrong
        text = "..."
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
