"""Tools of servers that speak the Model Context Protocol, over stdio or HTTP, through its official SDK.

Needs the extra ``mcp``. The SDK is asynchronous: a thread of its own runs each connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.tools import ArgumentError, Tool, ToolFailure, patience
from rehearsal.environments.episode import real_number
from rehearsal.errors import ToolError

_CLOSING_SECONDS = 5.0
_MAX_PROBLEM = 200
_MAX_SAID = 4096
"""Bytes of a server's standard error that are kept: the last ones."""
_LAST_WORDS_SECONDS = 1.0
_GRACE = 1.0
"""Seconds after which a call that nobody waits for any more is taken back; it would wait in vain for ever."""
_START_TRIES = 3
"""How often a server that was there before is started again where it ends at once."""
_ENDED = "the server of this tool has ended"
_LOST = {(-32000, "Connection closed"), (-32600, "Session terminated")}
"""What the SDK says where the connection is gone, or a server over HTTP has forgotten it."""
_SAYS_MORE = frozenset({
    "additionalProperties", "allOf", "anyOf", "dependentSchemas", "if", "oneOf", "patternProperties", "$ref",
    "unevaluatedProperties",
})  # fmt: skip
"""Keywords of a JSON schema that may allow arguments beside those that ``properties`` lists."""


class Mcp(ToolSource):
    """The tools of one MCP server.

    Args:
        command: starts a server that speaks over its standard input and output: words, or one text that is split as a
            shell would.
        url: of a server that speaks streamable HTTP, in place of a command.
        env: environment variables of the server, beside a few that are safe to pass on.
        only: names of the tools to take; all if left out.
        prefix: put before the names, where two servers have tools of one name.
        per_episode: whether each episode gets a connection (and, with a command, a server) of its own. A server that
            remembers what it was told would otherwise carry it from one episode to another.
        start_timeout: seconds that connecting may take.

    Raises:
        ToolError: if the SDK is missing, the server cannot be reached, or it has no such tools.
    """

    def __init__(
        self, command: str | Sequence[str] | None = None, url: str | None = None, env: Mapping[str, str] | None = None,
        only: Sequence[str] | None = None, prefix: str = "", per_episode: bool = False, start_timeout: float = 30.0,
    ) -> None:  # fmt: skip
        if (command is None) == (url is None):
            raise ToolError("An MCP server needs either a command that starts it or the url that it is at.")
        self._server = url if url is not None else _stdio(command or (), env)
        self._told = url or (command if isinstance(command, str) else shlex.join(command or ()))
        self._only = None if only is None else list(only)
        self._prefix, self._per_episode = prefix, per_episode
        self._seconds = real_number("start_timeout", start_timeout, 0.01, 3600)
        self._lock = threading.Lock()
        self._shared: _Connection | None = None
        self._attempt: Future[_Connection] | None = None
        self._closings = 0
        connection = self._connect()
        if per_episode:
            connection.close()  # it was there to see that it works
        else:
            self._shared = connection

    def open(self) -> Sequence[Tool]:
        if self._per_episode:
            connection = self._connect()
            return self._tools(connection, connection.close)  # _connect has seen that they can be made
        return self._tools(self._present(), None)

    def close(self) -> None:
        with self._lock:
            self._closings += 1
            shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()
            shared.join()

    def _present(self) -> _Connection:
        """The connection that all episodes share.

        A server that ended is started again for the next episode; calls on the way failed and were counted. Episodes
        that begin meanwhile wait for the one attempt and share its failure: if each tried for itself, one after the
        other, those whose time is over would hold up those that come.
        """
        with self._lock:
            if self._shared is not None and self._shared.alive:
                return self._shared
            attempt, mine = self._attempt or Future(), self._attempt is None
            self._attempt, closings = attempt, self._closings
        if mine:
            try:
                connection = self._connected_again()
            except BaseException as error:
                with self._lock:
                    self._attempt = None
                attempt.set_exception(error)
            else:
                with self._lock:
                    self._attempt = None
                    if self._closings > closings:  # nobody will close it later
                        connection.close()
                    else:
                        self._shared = connection
                attempt.set_result(connection)
        return attempt.result()

    def _connected_again(self) -> _Connection:
        for tries_left in reversed(range(_START_TRIES)):
            try:
                return self._connect()
            except _EndedError:
                if not tries_left:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    def _connect(self) -> _Connection:
        connection = _Connection(self._server, self._told, self._seconds)
        names = [tool["name"] for tool in connection.listed]
        missing = [name for name in self._only or () if name not in names]
        if missing or not names:
            connection.close()
            wanted = missing[0] if missing else "at all"
            raise ToolError(f"The MCP server {self._told} has no tool {wanted}; it has: {', '.join(names) or 'none'}.")
        try:
            self._tools(connection, None)
        except ToolError:
            connection.close()
            raise
        return connection

    def _tools(self, connection: _Connection, close: Callable[[], None] | None) -> list[Tool]:
        tools: list[Tool] = []
        for listed in connection.listed:
            if self._only is not None and listed["name"] not in self._only:
                continue
            tools.append(
                Tool(
                    self._prefix + listed["name"], listed["description"], listed["parameters"],
                    partial(connection.call, listed["name"]), listed["check"],
                    close=close if not tools else None,  # once is enough
                )
            )  # fmt: skip
        return tools


def mcp_tools(**options: Any) -> Mcp:
    """The tools of an MCP server: ``mcp_tools(command="python server.py")`` or ``mcp_tools(url="http://...")``; see
    :class:`Mcp`."""
    return Mcp(**options)


class _EndedError(ToolError):
    """A server ended as it was started."""


class _StandardError:
    """The end of what a server says on its standard error, which would spoil the screen of a run. A pipe that is always
    read: a server may say as much as it likes, for as long as it runs, and neither waits nor fills a disk.

    Attributes:
        pen: what the server writes to; closed here once the server has it.
    """

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.pen = os.fdopen(writing, "w", encoding="utf-8", errors="replace")
        self._said = b""
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True, name="rehearsal-mcp-errors")
        self._reader.start()

    def last_line(self) -> str:
        """What it said last, once it can say no more, or has had a moment to."""
        self._reader.join(_LAST_WORDS_SECONDS)
        lines = [line.strip() for line in self._said.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][:_MAX_PROBLEM] if lines else ""

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb", buffering=0) as end:
            while piece := end.read(1 << 16):
                self._said = (self._said + piece)[-_MAX_SAID:]


class _Connection:
    """A connection and the thread that runs it.

    Attributes:
        listed: name, description, parameters (JSON schema) and check of each tool.
    """

    def __init__(self, server: Any, told: str, seconds: float) -> None:
        self.listed: list[dict[str, Any]] = []
        self._server = server
        self._client: Any = None
        self._task: asyncio.Task[None] | None = None
        self._errors = None if isinstance(server, str) else _StandardError()  # its last words are told if it fails
        self._loop = asyncio.new_event_loop()
        self._leave = asyncio.Event()
        self._begun: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True, name="rehearsal-mcp")
        self._thread.start()
        try:
            self._begun.result(seconds)
        except Exception as error:
            self.close()
            what = f"did not answer within {seconds:g} s" if isinstance(error, TimeoutError) else _first(error)
            said = self._errors.last_line() if self._errors is not None else ""
            what += f" ({said})" if said else ""
            kind = _EndedError if _ended_at_once(error) else ToolError
            raise kind(f"The MCP server {told} cannot be used: {what}.") from error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._leave.is_set()

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if not self.alive:
            raise ToolFailure(_ENDED)
        seconds = patience.get()
        calling = self._call(name, dict(arguments), None if seconds is None else seconds + _GRACE)
        try:
            answer = asyncio.run_coroutine_threadsafe(calling, self._loop)
        except RuntimeError as error:  # it ended this very moment
            calling.close()
            raise ToolFailure(_ENDED) from error
        # An answer that the thread left behind as it ended would never come.
        either: list[Future[Any]] = [answer, self._ended]
        wait(either, return_when=FIRST_COMPLETED)
        if not answer.done() or answer.cancelled():
            answer.cancel()
            raise ToolFailure(_ENDED)
        return answer.result()

    def close(self) -> None:
        """Let it end, without waiting."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._end)

    def join(self) -> None:
        self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._task = self._loop.create_task(self._live())
            self._loop.run_until_complete(self._task)
        except BaseException as error:  # told to whoever waits; nobody else could hear it
            if not self._begun.done():
                self._begun.set_exception(error if isinstance(error, Exception) else RuntimeError("was ended"))
        finally:
            with contextlib.suppress(Exception):
                self._loop.run_until_complete(_end_others())
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            self._ended.set_result(None)

    async def _live(self) -> None:
        # Our own end of the server's standard error is closed once it has its own: the last one tells that it ended.
        with contextlib.nullcontext() if self._errors is None else self._errors.pen as pen:
            sdk = _sdk()
            server = self._server if pen is None else sdk.stdio_client(self._server, errlog=pen)
            async with sdk.Client(server) as client:
                if pen is not None:
                    pen.close()
                self._client = client
                self.listed = await _list(client)
                self._begun.set_result(None)
                await self._leave.wait()

    def _end(self) -> None:
        self._leave.set()
        if self._task is not None and not self._begun.done():
            self._task.cancel()  # it is still waiting for the server's first words

    async def _call(self, name: str, arguments: dict[str, Any], seconds: float | None) -> str:
        try:
            result = await self._client.call_tool(name, arguments, seconds)
        except _sdk().MCPError as error:
            if _has_ended(error):
                self._leave.set()
            raise ToolFailure(_first(error)) from error
        text = _text_of(result)
        if result.is_error:
            raise ToolFailure(text or "the tool failed and did not say why")
        return text


async def _end_others() -> None:
    """Calls that came while the connection ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _list(client: Any) -> list[dict[str, Any]]:
    found: list[Any] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if not cursor:
            break
    return [
        {
            "name": tool.name, "description": " ".join((tool.description or tool.name).split()),
            "parameters": dict(tool.input_schema), "check": _checker(dict(tool.input_schema)),
        }
        for tool in found
    ]  # fmt: skip


def _checker(schema: dict[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Checks arguments by a JSON schema, so that what is wrong is told as it is for other tools."""
    import referencing
    from jsonschema import Draft202012Validator

    # An empty registry: without one the library would fetch what a schema refers to.
    validator: Any = Draft202012Validator(schema, registry=referencing.Registry())
    # Names that are not listed may still be meant where something else than the list can allow them.
    names = None if _SAYS_MORE & schema.keys() else schema.get("properties")

    def check(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            problems = sorted(validator.iter_errors(dict(arguments)), key=lambda problem: list(map(str, problem.path)))
        except Exception:  # a schema that is none; the server knows what it meant, and checks for itself
            return arguments
        if problems:
            told = []
            for problem in problems[:3]:
                where = ".".join(str(part) for part in problem.absolute_path)
                told.append(f"{where}: {problem.message}"[:_MAX_PROBLEM] if where else problem.message[:_MAX_PROBLEM])
            raise ArgumentError("; ".join(told))
        unknown = [name for name in arguments if names is not None and name not in names]
        if unknown:
            raise ArgumentError(f"there is no argument {unknown[0][:60]}")
        return arguments

    return check


def _text_of(result: Any) -> str:
    parts = []
    for block in result.content:
        text = getattr(block, "text", None)
        parts.append(text if isinstance(text, str) else f"({getattr(block, 'type', 'content')} that cannot be shown)")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _stdio(command: str | Sequence[str], env: Mapping[str, str] | None) -> Any:
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except ValueError as error:
        raise ToolError(f"The command that starts an MCP server cannot be read ({error}): {command}.") from error
    if not words:
        raise ToolError("The command that starts an MCP server is empty.")
    return _sdk().StdioServerParameters(
        command=words[0], args=words[1:], env=dict(env) if env else None, cwd=os.getcwd()
    )


def _sdk() -> Any:
    try:
        import mcp
    except ImportError as error:
        raise ToolError("Tools of MCP servers need the SDK: pip install 'rehearsal[mcp]'.") from error
    return mcp


def _has_ended(error: Any) -> bool:
    """Whether an error says that the connection is gone. Servers use the same numbers for errors of their own, and may
    say of anything that it is closed."""
    return (error.code, error.message) in _LOST


def _ended_at_once(error: BaseException) -> bool:
    """Whether a server that was just started has ended again, by what the SDK says of it."""
    return "closed" in _first(error).casefold()


def _first(error: BaseException) -> str:
    """The first plain error in a group of them, on a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    told = " ".join(str(error).split())[:_MAX_PROBLEM].rstrip(".")
    return told or type(error).__name__
