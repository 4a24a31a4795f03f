"""The Python tool: a state for each episode, errors that help, and nothing left behind."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal.agents.toolbox import Toolbox, Toolkit
from rehearsal.agents.toolkit import make_source
from rehearsal.agents.toolkit.python import Python
from rehearsal.environments import make
from rehearsal.errors import RehearsalError, SandboxError
from rehearsal.sandbox import available
from rehearsal.trajectory import ToolCall

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))

from loopback import running_service

pytestmark = pytest.mark.skipif(all(available().values()), reason="there is no sandbox here")


@pytest.fixture(scope="module")
def source() -> Iterator[Python]:
    made = make_source("python", {"seconds": 2.0, "memory_mib": 128, "interpreters": 4})
    assert isinstance(made, Python)
    yield made
    made.close()


def call(toolbox: Toolbox, code: str) -> tuple[str, str]:
    result = toolbox.execute(ToolCall("python", {"code": code}))
    return result.told, result.error


def test_variables_stay_within_an_episode_and_no_longer(source: Python) -> None:
    first, second = Toolbox(source.open()), Toolbox(source.open())
    assert call(first, "x = 20\nprint('made')") == ("made", "")
    assert call(first, "x + 1") == ("21", "")
    told, error = call(second, "x")
    assert "NameError" in told and error == "raised"
    assert call(second, "x = 5") == ("(no output)", "")
    assert call(first, "x") == ("20", "")
    first.close()
    second.close()


def test_an_error_is_shown_with_what_was_printed(source: Python) -> None:
    toolbox = Toolbox(source.open())
    told, error = call(toolbox, "print('so far')\n1 / 0")
    assert error == "raised"
    assert told.startswith("Error: so far\n") and "ZeroDivisionError" in told
    assert len(told.splitlines()) > 2, "a traceback keeps its lines"
    toolbox.close()


def test_a_call_that_takes_too_long_costs_the_variables(source: Python) -> None:
    toolbox = Toolbox(source.open())
    call(toolbox, "x = 1")
    told, error = call(toolbox, "while True: pass")
    assert error == "raised" and "time was over" in told
    told, error = call(toolbox, "'x' in globals()")
    assert "lost" in told and "False" in told and not error
    toolbox.close()


def test_places_come_back(source: Python) -> None:
    for _ in range(3):
        boxes = [Toolbox(source.open()) for _ in range(4)]
        assert [call(box, "1 + 1")[0] for box in boxes] == ["2"] * 4
        for box in boxes:
            box.close()
    # Episodes that never call take no place.
    idle = [Toolbox(source.open()) for _ in range(20)]
    assert call(idle[0], "1")[0] == "1"
    for box in idle:
        box.close()


def test_that_there_is_no_place_is_no_failure_of_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rehearsal.agents.toolkit.python._GRACE", 0.2)
    with contextlib.closing(make_source("python", {"seconds": 2.0, "memory_mib": 128, "interpreters": 1})) as small:
        first, second = Toolbox(small.open()), Toolbox(small.open())
        call(first, "1")
        with pytest.raises(SandboxError, match="interpreters"):
            call(second, "1")
        first.close()
        second.close()


def test_a_closed_episode_calls_nothing(source: Python) -> None:
    toolbox = Toolbox(source.open())
    call(toolbox, "1")
    toolbox.close()
    patience = time.monotonic() + 60
    while "over" not in call(toolbox, "1")[0]:
        assert time.monotonic() < patience
        time.sleep(0.05)


def test_beside_the_tools_of_an_environment(source: Python) -> None:
    env = make("lookup", people=12)
    env.reset(seed=0)
    toolbox = Toolkit([source]).open(env)
    assert toolbox is not None and list(toolbox.tools) == ["search", "open", "python"]
    title = env.describe()["documents"][0]
    found = toolbox.execute(ToolCall("search", {"query": title})).told
    assert f"[{title}]" in found.splitlines()[0]
    read = toolbox.execute(ToolCall("open", {"document": title})).told
    assert env.oracle()[0] in read or len(env.describe()["documents"]) > 1
    assert title in read
    toolbox.close()


def test_a_service_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SANDBOX_KEY", "k")
    with running_service() as service:
        options = {"url": service.url, "api_key_env": "SANDBOX_KEY", "seconds": 2.0}
        with contextlib.closing(make_source("python", options)) as remote:
            assert remote.facts() == {"sandbox": "remote"}
            first, second = Toolbox(remote.open()), Toolbox(remote.open())
            assert call(first, "x = 20\nprint('made')") == ("made", "")
            assert call(first, "x + 1") == ("21", "")
            assert "NameError" in call(second, "x")[0]
            assert "time was over" in call(first, "while True: pass")[0]
            assert "lost" in call(first, "'x' in globals()")[0]
            assert call(second, "1 + 1") == ("2", "")
            first.close()
            second.close()
        assert {headers["Authorization"] for headers in service.headers} == {"Bearer k"}
    with contextlib.closing(make_source("python", {"url": service.url})) as down:
        monkeypatch.setattr(down.pool, "_attempts", 1)
        toolbox = Toolbox(down.open())
        with pytest.raises(SandboxError, match="is it running"):
            call(toolbox, "1")
        toolbox.close()


def test_what_cannot_be_had() -> None:
    for option in ({"isolation": "filters"}, {"preload": ["json"]}, {"packages": ["lib"]}):
        with pytest.raises(RehearsalError, match="of the own sandbox"):
            make_source("python", {"url": "http://sandbox.example", **option})
    with pytest.raises(RehearsalError, match="a key needs one"):
        make_source("python", {"api_key_env": "SANDBOX_KEY"})
    with pytest.raises(RehearsalError, match="isolation"):
        make_source("python", {"isolation": "concrete"})
    with pytest.raises(RehearsalError, match="time limit"):
        make_source("python", {"seconds": 0})
