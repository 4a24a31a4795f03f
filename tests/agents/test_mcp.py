"""Tools of a real MCP server, over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal.agents.toolbox import Toolbox, ToolLimits
from rehearsal.agents.toolkit.mcp import Mcp, _checker, _has_ended, mcp_tools
from rehearsal.agents.tools import Tool
from rehearsal.errors import ToolError
from rehearsal.trajectory import ToolCall

pytest.importorskip("mcp", reason="needs the extra mcp")

SERVER = """
import os, sys, time
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("demo")
notes = []

@server.tool()
def add(a: int, b: int = 1) -> int:
    "Adds two numbers."
    return a + b

@server.tool()
def remember(word: str) -> str:
    "Remembers a word."
    notes.append(word)
    return " ".join(notes)

@server.tool()
def fail(word: str) -> str:
    "Fails."
    raise ToolError("cannot " + word)

@server.tool()
def pid() -> int:
    "The server's process."
    return os.getpid()

@server.tool()
def stall() -> str:
    "Says nothing."
    time.sleep(600)
    return ""

@server.tool()
def secret() -> str:
    "An environment variable."
    return os.environ.get("DEMO_SECRET", "none")

@server.tool()
def shout(lines: int) -> str:
    "Complains."
    for number in range(lines):
        print("x" * 999, number, file=sys.stderr)
    sys.stderr.flush()
    return "said"

@server.tool()
def hang(seconds: float) -> str:
    "Waits."
    time.sleep(seconds)
    return "late"

if len(sys.argv) > 1:
    server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mcp") / "server.py"
    file.write_text(SERVER)
    return file


@pytest.fixture(scope="module")
def stdio(script: Path) -> Iterator[Mcp]:
    source = mcp_tools(command=[sys.executable, str(script)], env={"DEMO_SECRET": "s"}, start_timeout=120.0)
    yield source
    source.close()


def box_of(source: Mcp) -> Toolbox:
    return Toolbox(list(source.open()), ToolLimits(timeout=60.0))


def say(box: Toolbox, tool_name: str, **arguments: Any) -> Any:
    return box.execute(ToolCall(tool_name, arguments))


def test_what_a_server_says_on_its_standard_error_is_not_piled_up(stdio: Mcp) -> None:
    connection = stdio._shared
    assert connection is not None and connection._errors is not None
    # More than a pipe holds by far: a server that nobody listened to would wait here.
    assert say(box_of(stdio), "shout", lines=5000).text == "said"
    patience = time.monotonic() + 60
    while not connection._errors._said.endswith(b" 4999\n") and time.monotonic() < patience:
        time.sleep(0.01)
    assert connection._errors._said.endswith(b" 4999\n")
    assert len(connection._errors._said) <= 4096
    assert connection._errors.pen.closed, "with our own end open, the end of the server would not be seen"


def test_nothing_is_left_of_a_server_that_was_closed(script: Path) -> None:
    source = mcp_tools(command=[sys.executable, str(script)], start_timeout=120.0)
    connection = source._shared
    assert connection is not None and connection._errors is not None
    source.close()
    connection._errors._reader.join(20)
    assert not connection._errors._reader.is_alive()


def test_tools_of_a_server_that_is_started(stdio: Mcp) -> None:
    box = box_of(stdio)
    assert list(box.tools) == ["add", "remember", "fail", "pid", "stall", "secret", "shout", "hang"]
    add = box.tools["add"]
    assert add.description == "Adds two numbers."
    assert add.signature == "add(a: integer, b: integer = 1)"
    assert say(box, "add", a=2, b=3).text == "5"
    assert say(box, "add", a=2).text == "3"
    assert say(box, "secret").text == "s"
    failed = say(box, "fail", word="walk")
    assert failed.error == "raised"
    assert "cannot walk" in failed.text


def hanging(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads of tools that were not there before."""
    return [thread for thread in set(threading.enumerate()) - before if thread.name == "rehearsal-tool"]


def test_a_call_that_hangs_is_taken_back(stdio: Mcp) -> None:
    """Its thread would otherwise wait as long as the server runs."""
    before = set(threading.enumerate())
    box = Toolbox(list(stdio.open()), ToolLimits(timeout=0.5))
    assert say(box, "stall").error == "timeout"
    deadline = time.monotonic() + 30
    while hanging(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not hanging(before)
    assert say(box_of(stdio), "add", a=2).text == "3", "the connection goes on"


def test_no_call_waits_for_a_connection_that_has_ended(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that comes as the connection ends has nobody to answer it."""
    source = Mcp([sys.executable, str(script)], start_timeout=120.0)
    connection = source._shared
    assert connection is not None
    said: list[Any] = []

    async def never(*_: Any) -> str:
        await asyncio.sleep(3600)
        return ""

    connection._call = never  # type: ignore[method-assign]
    box = box_of(source)
    calls = [threading.Thread(target=lambda: said.append(say(box_of(source), "add", a=1).text)) for _ in range(3)]
    for call in calls:
        call.start()
    time.sleep(0.3)
    source.close()
    for call in calls:
        call.join(30)
    assert said == ["Error: the server of this tool has ended"] * 3
    monkeypatch.setattr(type(connection), "alive", True)  # as if it were not known yet
    assert say(box, "add", a=1).text == "Error: the server of this tool has ended"


def test_arguments_are_checked_before_the_server_sees_them(stdio: Mcp) -> None:
    box = box_of(stdio)
    for arguments, told in (({}, "'a' is a required property"), ({"a": "x"}, "a: 'x' is not of type 'integer'"),
                            ({"a": 1, "c": 2}, "there is no argument c")):  # fmt: skip
        result = say(box, "add", **arguments)
        assert result.error == "arguments"
        assert told in result.note
        assert "Call it as add(a: integer" in result.note


def test_some_tools_under_other_names(script: Path) -> None:
    source = Mcp(shlex.join([sys.executable, str(script)]), only=["add"], prefix="demo_", start_timeout=120.0)
    try:
        box = box_of(source)
        assert list(box.tools) == ["demo_add"]
        assert say(box, "demo_add", a=1).text == "2"
    finally:
        source.close()
    assert say(box, "demo_add", a=1).text == "Error: the server of this tool has ended"


def test_a_call_that_hangs_ends_with_its_connection(script: Path) -> None:
    source = Mcp([sys.executable, str(script)], start_timeout=120.0)
    box = Toolbox(list(source.open()), ToolLimits(timeout=0.5))
    assert say(box, "hang", seconds=600).error == "timeout"
    assert say(box, "hang", seconds=600).error == "busy"
    source.close()
    deadline = time.monotonic() + 30
    while not box._busy["hang"].is_set() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert box._busy["hang"].is_set(), "its thread waits for ever"


def test_tools_that_cannot_be_named_are_told_at_once(script: Path) -> None:
    with pytest.raises(ToolError, match="'a b add' cannot name a tool"):
        Mcp([sys.executable, str(script)], prefix="a b ", start_timeout=120.0)


def test_only_a_lost_connection_counts_as_one() -> None:
    """A server may say of anything that it is closed, and the others that share it go on."""
    from mcp import MCPError

    assert _has_ended(MCPError(-32000, "Connection closed"))
    assert _has_ended(MCPError(-32600, "Session terminated"))
    assert not _has_ended(MCPError(-32000, "The position is closed"))
    assert not _has_ended(MCPError(-32602, "Connection closed"))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin", "properties": {"a": {"type": "no such type"}}},
        {"type": "object"},
        {"type": "object", "properties": {}, "anyOf": [{"properties": {"a": {"type": "integer"}}}]},
        {"type": "object", "$ref": "http://127.0.0.1:9/schema"},
        {"type": "object", "properties": {"a": True}},
    ],
)
def test_schemas_that_say_less_or_more_leave_the_check_to_the_server(schema: dict[str, Any]) -> None:
    assert _checker(schema)({"a": 1}) == {"a": 1}
    assert Tool("t", "Does it.", schema, dict).signature.startswith("t(")


@pytest.mark.slow
def test_a_server_for_each_episode_remembers_nothing(script: Path) -> None:
    source = Mcp([sys.executable, str(script)], per_episode=True, start_timeout=120.0)
    one, other = box_of(source), box_of(source)
    assert say(one, "remember", word="a").text == "a"
    assert say(other, "remember", word="b").text == "b"
    assert say(one, "pid").text != say(other, "pid").text
    number = int(say(one, "pid").text)
    one.close()
    other.close()
    deadline = time.monotonic() + 60
    while _runs(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(number), "the server ends with its episode"


@pytest.mark.slow
def test_a_server_that_dies_as_it_is_started_again_costs_no_episode(script: Path, tmp_path: Path) -> None:
    dying = tmp_path / "dying.py"
    log = tmp_path / "starts"
    dying.write_text(
        f"import os, sys\nwith open({str(log)!r}, 'a') as file:\n    file.write('x')\n"
        f"if os.path.getsize({str(log)!r}) in (2, 3, 5, 6, 7):\n    os._exit(9)\n{script.read_text()}"
    )
    source = Mcp([sys.executable, str(dying)], start_timeout=120.0)
    try:
        os.kill(int(say(box_of(source), "pid").text), signal.SIGKILL)
        assert say(box_of(source), "add", a=1).error in ("raised", "timeout")
        assert say(box_of(source), "add", a=1).text == "2"
        assert log.read_text() == "x" * 4
        os.kill(int(say(box_of(source), "pid").text), signal.SIGKILL)
        say(box_of(source), "add", a=1)
        with pytest.raises(ToolError, match="cannot be used"):
            source.open()
        assert log.read_text() == "x" * 7, "it is not tried for ever"
    finally:
        source.close()


def test_episodes_that_begin_together_share_one_attempt(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In line, those that nobody waits for any more would hold up the others."""
    source = Mcp([sys.executable, str(script)], start_timeout=120.0)
    tries: list[float] = []
    go = threading.Event()

    def hang() -> Any:
        tries.append(time.monotonic())
        go.wait(60)
        raise ToolError("no server")

    said: list[str] = []

    def begin() -> None:
        with pytest.raises(ToolError, match="no server"):
            source.open()
        said.append("told")

    assert source._shared is not None
    source._shared.close()
    source._shared.join()
    monkeypatch.setattr(source, "_connect", hang)
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    go.set()
    for thread in threads:
        thread.join(30)
    assert said == ["told"] * 8
    assert len(tries) == 1
    monkeypatch.undo()
    assert say(box_of(source), "add", a=1).text == "2", "the next one tries again"
    source.close()


@pytest.mark.slow
def test_a_server_that_dies_is_an_error_and_is_started_again(script: Path) -> None:
    source = Mcp([sys.executable, str(script)], start_timeout=120.0)
    try:
        box = box_of(source)
        os.kill(int(say(box, "pid").text), signal.SIGKILL)
        assert say(box, "add", a=1).error in ("raised", "timeout")
        assert say(box_of(source), "add", a=1).text == "2"
    finally:
        source.close()


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_tools_of_a_server_over_http(script: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(script), str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        source = Mcp(url=f"http://127.0.0.1:{port}/mcp", start_timeout=120.0)
        box = box_of(source)
        assert say(box, "add", a=2, b=3).text == "5"
        assert "cannot run" in say(box, "fail", word="run").text
        source.close()
    finally:
        process.terminate()
        process.wait(20)


def test_servers_that_cannot_be_used(script: Path) -> None:
    for options, told in (
        ({}, "either a command"),
        ({"command": "x", "url": "y"}, "either a command"),
        ({"command": ""}, "empty"),
        ({"command": "no-such-program-at-all"}, "no-such-program-at-all cannot be used"),
        ({"command": [sys.executable, "-c", "raise OSError('no licence')"], "start_timeout": 60.0}, "no licence"),
        ({"command": [sys.executable, "-c", "import time; time.sleep(9)"], "start_timeout": 1.0}, "within 1 s"),
        ({"url": "http://127.0.0.1:9/mcp"}, "cannot be used"),
    ):
        with pytest.raises(ToolError, match=told):
            Mcp(**options)  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="no tool walk; it has: add, remember"):
        Mcp([sys.executable, str(script)], only=["walk"], start_timeout=120.0)
