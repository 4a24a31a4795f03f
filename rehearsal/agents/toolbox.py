"""The tools of one episode, and what makes them: calls with limits, time limits, and errors that an agent can act on.

A :class:`Toolkit` belongs to a run. For every episode it opens a :class:`Toolbox` with tools of its own, so that notes,
counts and whatever else a tool remembers never get from one episode into another.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rehearsal.agents.tools import ArgumentError, Tool, ToolFailure, as_tool, patience, result_text
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError, RehearsalError, SandboxError, ToolError
from rehearsal.texts import clean_text
from rehearsal.time_limit import LateError, in_time
from rehearsal.trajectory import ToolCall
from rehearsal.usage import merged

_MAX_QUOTED = 40
_MAX_LISTED = 20
_MAX_ERROR = 500


@dataclass(frozen=True)
class ToolLimits:
    """What the tools of an episode may use.

    Attributes:
        max_calls: calls in an episode; None for any number.
        max_calls_per_turn: calls in one answer that count.
        per_tool: by the name of a tool, calls of it in an episode.
        cost: what a call takes off the reward, whether it succeeds or not; not negative.
        timeout: seconds that a call may take, for tools that are not fast.
        max_characters: of a result; the rest is cut off, and the agent is told.

    Raises:
        RecipeError: for a value that cannot be used.
    """

    max_calls: int | None = None
    max_calls_per_turn: int = 4
    per_tool: Mapping[str, int] = field(default_factory=dict)
    cost: float = 0.0
    timeout: float = 10.0
    max_characters: int = 2000

    def __post_init__(self) -> None:
        counts = {"max_calls": self.max_calls, "max_calls_per_turn": self.max_calls_per_turn,
                  "max_characters": self.max_characters, **self.per_tool}  # fmt: skip
        for name, count in counts.items():
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise RecipeError(f"The limit {name} of the tools must be a whole number from 1 on, not {count!r}.")
        if not math.isfinite(self.cost) or self.cost < 0:
            raise RecipeError(f"The cost of a tool call must be zero or more, not {self.cost}.")
        if not self.timeout > 0:
            raise RecipeError(f"The time limit of a tool call must be above 0 seconds, not {self.timeout}.")


@dataclass(frozen=True)
class ToolResult:
    """What came of a call.

    Attributes:
        text: the tool's own words, its errors included; cut to the limit of characters.
        note: the harness's words: what is wrong with the call, or how much of the text was cut; "" if nothing.
        error: the kind of failure, as in :class:`rehearsal.trajectory.ToolCall`; "" if there is none.
        cost: what the call takes off the reward.
    """

    text: str = ""
    note: str = ""
    error: str = ""
    cost: float = 0.0

    @property
    def told(self) -> str:
        """Everything that the agent is told of it."""
        return "\n".join(part for part in (self.text, self.note) if part)


class Toolbox:
    """The tools of one episode. Used by one thread at a time; close it when the episode is over.

    Args:
        tools: with different names.
        limits: what they may use.
        own: names of those that belong to the environment.

    Attributes:
        calls: calls that were answered, by tool.
        used: calls that were answered, those of tools that do not exist included.

    Raises:
        ToolError: for two tools of one name.
    """

    def __init__(self, tools: Sequence[Tool], limits: ToolLimits | None = None, own: Iterable[str] = ()) -> None:
        self.limits = limits or ToolLimits()
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise ToolError(f"Two tools are called {tool.name}; give one of them another name.")
            self.tools[tool.name] = tool
        self.calls: Counter[str] = Counter()
        self.used = 0
        self._own = frozenset(own)
        self._busy: dict[str, threading.Event] = {}
        self._closed = False

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What the agent is told of the tools, in order."""
        return [tool.schema for tool in self.tools.values()]

    @property
    def calls_left(self) -> int | None:
        """Calls that the episode has left; None for any number."""
        return None if self.limits.max_calls is None else max(0, self.limits.max_calls - self.used)

    @property
    def disturbed(self) -> bool:
        """Whether a call of a tool of the environment has not come back: nobody knows what it does to it."""
        return any(name in self._own and not done.is_set() for name, done in self._busy.items())

    def seconds_for(self, calls: Sequence[ToolCall]) -> float:
        """The most seconds that these calls can take."""
        tools = [self.tools[call.name] for call in calls if call.name in self.tools]
        return sum(self._timeout(tool) for tool in tools if not tool.fast)

    def play(self, calls: Sequence[ToolCall]) -> tuple[list[ToolCall], list[ToolResult]]:
        """Execute the calls of one answer in order; the calls with what came of them, and the results."""
        results = [self.execute(call) for call in calls]
        told = [
            replace(call, result=result.told, error=result.error, cost=result.cost)
            for call, result in zip(calls, results, strict=True)
        ]
        return told, results

    def execute(self, call: ToolCall) -> ToolResult:
        """Execute a call. Whatever the tool does, there is a result: an exception, a wrong type or a call that takes
        too long are errors for the agent."""
        if self.calls_left == 0:
            return ToolResult(note=f"No tool calls are left: all {self.limits.max_calls} are used.", error="limit")
        tool = self.tools.get(call.name)
        if tool is None:
            self.used += 1
            return ToolResult(note=self._unknown(call.name), error="unknown", cost=self.limits.cost)
        most = self.limits.per_tool.get(tool.name)
        if most is not None and self.calls[tool.name] >= most:
            return ToolResult(note=f"No calls of {tool.name} are left: all {most} are used.", error="limit")
        self.used += 1
        self.calls[tool.name] += 1
        result = self._executed(tool, call)
        return replace(result, cost=self.limits.cost if tool.cost is None else tool.cost)

    def count_notice(self, calls: Sequence[ToolCall]) -> str:
        """How many calls were made and what those of an answer cost, for the agent: "Call 2 of 3; cost 0.1." """
        made = [call for call in calls if call.error != "limit"]
        parts = []
        if self.limits.max_calls is not None and made:
            first, last = self.used - len(made) + 1, self.used
            numbers = f"Call {last}" if first == last else f"Calls {first} to {last}"
            parts.append(f"{numbers} of {self.limits.max_calls}")
        for name in dict.fromkeys(call.name for call in made):
            if name in self.limits.per_tool:
                parts.append(f"{name} {self.calls[name]} of {self.limits.per_tool[name]}")
        if paid := sum(call.cost for call in made):
            parts.append(f"{'cost' if parts else 'Cost'} {paid:g}")
        return f"{'; '.join(parts)}." if parts else ""

    def close(self) -> None:
        """End what the tools hold. Closing twice is harmless; a tool that fails to close is left as it is."""
        if self._closed:
            return
        self._closed = True
        _close(self.tools.values())

    def _executed(self, tool: Tool, call: ToolCall) -> ToolResult:
        late = self._busy.get(tool.name)
        if late is not None and not late.is_set():
            return ToolResult(note=f"{tool.name} is still busy with an earlier call that took too long.", error="busy")
        try:
            arguments = tool.check(call.arguments)
        except ArgumentError as error:
            told = clean_text(f"Wrong arguments: {error}. Call it as {tool.signature}.")
            return ToolResult(note=told, error="arguments")
        except Exception as error:
            return self._cut(_raised(error), "raised")
        seconds = self._timeout(tool)
        try:
            if tool.fast:
                return self._cut(result_text(tool.run(arguments)))
            return self._cut(
                in_time(partial(_patiently, partial(tool.run, arguments), seconds), seconds, "rehearsal-tool")
            )
        except (KeyboardInterrupt, SandboxError):
            raise  # that there is no sandbox is no doing of the agent
        except LateError as error:
            self._busy[tool.name] = error.done
            return ToolResult(note=f"{tool.name} took longer than {seconds:g} s and was left.", error="timeout")
        except BaseException as error:  # a tool is somebody else's code, and may raise SystemExit and worse
            return self._cut(_raised(error), "raised")

    def _timeout(self, tool: Tool) -> float:
        return self.limits.timeout if tool.timeout is None else tool.timeout

    def _cut(self, text: str, error: str = "") -> ToolResult:
        most = self.limits.max_characters
        if len(text) > most:
            note = f"(cut: the first {most} of {len(text)} characters)"
            return ToolResult(text[:most], note, error)
        return ToolResult(text, "" if text.strip() else "(no output)", error)

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name[:200], self.tools, n=2, cutoff=0.5)
        there = [tool.signature for tool in self.tools.values()]
        listed = "; ".join(there[:_MAX_LISTED]) + ("; ..." if len(there) > _MAX_LISTED else "")
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        shown = " ".join(name.split())
        shown = shown if len(shown) <= _MAX_QUOTED else shown[: _MAX_QUOTED - 3] + "..."
        return clean_text(f'There is no tool "{shown}".{hint} There are: {listed}.')


class ToolSource(ABC):
    """Makes the tools of episodes. What all episodes may share, such as a corpus, it holds itself; whatever an episode
    changes is made anew in :meth:`open`."""

    fast: bool = False
    """Whether all its tools are fast, and :meth:`open` is."""

    @abstractmethod
    def open(self) -> Sequence[Tool]:
        """The tools of one episode. May be called from several threads at once."""

    def facts(self) -> Mapping[str, str]:
        """What the tools work with, for the plan and the records of a run, such as ``{"sandbox": "namespaces"}``."""
        return {}

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Give back what it holds; called when the run is over."""


class FunctionTools(ToolSource):
    """Tools that remember nothing, the same for all episodes.

    Args:
        functions: with types and docstrings, or tools.
    """

    def __init__(self, *functions: Callable[..., Any] | Tool) -> None:
        self._tools = [as_tool(function) for function in functions]
        self.fast = all(tool.fast for tool in self._tools)

    def open(self) -> Sequence[Tool]:
        return self._tools


class Toolkit:
    """The tools of a run.

    Args:
        sources: of the tools that agents have in every environment.
        limits: what an episode's tools may use, those of the environment included.
        names: of the sources, in the same order, for those that may be locked.

    Raises:
        ToolError: for names that are not as many as the sources.
    """

    def __init__(
        self, sources: Sequence[ToolSource] = (), limits: ToolLimits | None = None, names: Sequence[str] | None = None
    ) -> None:  # fmt: skip
        self.sources = list(sources)
        self.names = [""] * len(self.sources) if names is None else list(names)
        if len(self.names) != len(self.sources):
            raise ToolError(f"There are {len(self.sources)} sources of tools and {len(self.names)} names for them.")
        self.limits = limits or ToolLimits()

    @property
    def fast(self) -> bool:
        """Whether episodes can call the tools in line, without a thread."""
        return all(source.fast for source in self.sources)

    def add(self, source: ToolSource, name: str = "") -> None:
        """Add a source; the toolkit closes it."""
        self.sources.append(source)
        self.names.append(name)

    def open(self, env: TextEnv, locked: Collection[str] = ()) -> Toolbox | None:
        """The tools of one episode: the environment's own first; None if there are none at all.

        Args:
            env: in the state that it has after its reset.
            locked: names of sources and of the environment's own tools that this episode does not have: to the agent
                they are tools that there are not.

        Raises:
            EnvironmentFault: if the environment's tools cannot be used.
            ToolError: if others cannot be opened.
        """
        # A fast environment says of itself that nothing in it takes long.
        try:
            own = [tool for tool in (as_tool(one, fast=env.fast) for one in env.tools) if tool.name not in locked]
        except RehearsalError as error:
            raise EnvironmentFault(f"{type(env).__name__}.tools cannot be used: {error}") from error
        opened: list[Tool] = []
        try:
            for source, name in zip(self.sources, self.names, strict=True):
                opened += source.open() if name not in locked else ()
            return Toolbox([*own, *opened], self.limits, [tool.name for tool in own]) if own or opened else None
        except BaseException:
            _close(opened)
            raise

    def facts(self) -> dict[str, str]:
        """What the tools of the sources work with."""
        return merged(source.facts() for source in self.sources)

    def close(self) -> None:
        """Close the sources."""
        for source in self.sources:
            with contextlib.suppress(Exception):
                source.close()


def _close(tools: Iterable[Tool]) -> None:
    for tool in tools:
        if tool.close is not None:
            with contextlib.suppress(Exception):
                tool.close()


def _patiently(run: Callable[[], Any], seconds: float) -> str:
    """What a call of a tool gives, as text; the tool may ask how long it may take."""
    patience.set(seconds)
    return result_text(run())


def _raised(error: BaseException) -> str:
    try:
        said = clean_text(str(error)).strip()
    except Exception:  # a broken __str__ must not hide that it failed
        said = ""
    if isinstance(error, ToolFailure) and said:
        return f"Error: {said}"  # the tool's own words, line by line
    told = " ".join(said.split())[:_MAX_ERROR]
    return f"Error: {type(error).__name__}{': ' + told if told else ''}"
