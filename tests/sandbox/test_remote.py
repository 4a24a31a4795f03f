"""A sandbox service behind the same interface, against one that this test starts on loopback."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rehearsal import usage
from rehearsal.environments.repair import inside
from rehearsal.errors import SandboxError
from rehearsal.rewards import code_judge
from rehearsal.sandbox import CallResult, InterpreterPool, Limits, Outcome, RemoteSandbox, available

sys.path.insert(0, str(Path(__file__).parent))

from loopback import Service, finished, really, running_service
from pools import SMALL


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.closing(Service()) as made:
        yield made


@pytest.fixture
def remote(service: Service) -> Iterator[RemoteSandbox]:
    with RemoteSandbox(service.url + "/", headers={"X-Key": "k"}, wait=0.01) as made:
        yield made


def test_a_program_is_sent_and_its_result_read(service: Service, remote: RemoteSandbox) -> None:
    service.answer = lambda request: (200, finished(stdout=request["stdin"].upper()))
    limits = Limits(seconds=3, memory_bytes=64 << 20)
    result = remote.run_program("source", stdin="in", files={"a": "text", "b": b"\0"}, limits=limits)
    assert (result.stdout, result.outcome, result.exit_status) == ("IN", Outcome.FINISHED, 0)
    assert result.isolation == "remote"
    (request,) = service.requests
    assert request == {
        "path": "/run_code", "code": "source", "language": "python", "stdin": "in", "run_timeout": 3,
        "memory_limit_MB": 64,
        "files": {name: base64.b64encode(content).decode() for name, content in {"a": b"text", "b": b"\0"}.items()},
    }  # fmt: skip
    assert service.headers[0]["X-Key"] == "k"


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (finished(1, stderr="Traceback\nValueError: x"), Outcome.RAISED),
        (finished(1, stderr="Traceback\nMemoryError"), Outcome.MEMORY),
        (finished(-9), Outcome.KILLED),
        (finished(status="TimeLimitExceeded"), Outcome.TIMEOUT),
        (finished(status="Error"), Outcome.GONE),
        (finished(stdout="x" * 100), Outcome.OUTPUT),
    ],
)
def test_how_programs_end(service: Service, remote: RemoteSandbox, body: dict[str, Any], outcome: Outcome) -> None:
    service.answer = lambda request: (200, body)
    result = remote.run_program("source", limits=Limits(output_bytes=50))
    assert result.outcome is outcome
    assert len(result.stdout) <= 50


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, {"status": "SandboxError", "message": "no room"}, "no room"),
        (200, b"<html>", "not the API"),
        (200, [], "not the API"),
        (200, {"status": "Success", "run_result": None}, "not the API"),
        (404, {}, "status 404"),
    ],
)
def test_a_service_that_fails_is_an_error(
    service: Service, remote: RemoteSandbox, status: int, body: Any, words: str
) -> None:
    service.answer = lambda request: (status, body)
    with pytest.raises(SandboxError, match=words):
        remote.run_program("source")
    assert len(service.requests) == 1


def test_a_busy_service_is_asked_again(service: Service, remote: RemoteSandbox) -> None:
    service.answer = lambda request: (200, finished()) if len(service.requests) == 3 else (503, {})
    assert remote.run_program("source").outcome is Outcome.FINISHED
    service.answer = lambda request: (429, {})
    with pytest.raises(SandboxError, match="status 429"):
        remote.run_program("source")
    assert len(service.requests) == 3 + 4


def test_a_service_that_is_not_there(service: Service) -> None:
    service.server.server_close()
    service.server.shutdown()
    with (
        RemoteSandbox(service.url, attempts=2, wait=0.01) as remote,
        pytest.raises(SandboxError, match="is it running"),
    ):
        remote.run_program("source")
    with pytest.raises(SandboxError, match="http://"):
        RemoteSandbox("sandbox:8080")
    with pytest.raises(SandboxError, match="NO_SUCH_KEY is not set"):
        RemoteSandbox(service.url, api_key_env="NO_SUCH_KEY")
    remote = RemoteSandbox(service.url)
    remote.close()
    with pytest.raises(SandboxError, match="was closed"):
        remote.run_program("source")


# Interpreters


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch, running_service() as made:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield made


@pytest.fixture(scope="module")
def at_service(running: Service) -> Iterator[RemoteSandbox]:
    with RemoteSandbox(running.url, limits=SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def here() -> Iterator[InterpreterPool]:
    if all(available().values()):
        pytest.skip("there is no sandbox here")
    with InterpreterPool(2, limits=SMALL) as made:
        yield made


def told(result: CallResult) -> tuple[Any, ...]:
    return result.output, result.error, result.outcome, result.state_lost, result.value


DEFINED = """
def change(a, *, b):
    a.append(b)
    b.clear()
    return {"sum": len(a), "pair": (a, {1.5})}
def fail(): raise ValueError("no")
def numbers(n): yield from range(n)
def strange(): return object()
def large(): return "x" * 5_000_000
"""

SAME: dict[str, list[Any]] = {
    "names live on": ["x = 20\ndef double(n):\n    return 2 * n", "double(x) + 2", "_ + 1", "None", "print('a'); 'b'"],
    "both streams": ["import sys; print('e', file=sys.stderr); print('o')", "import os; os.write(1, b'raw')"],
    "an exception": ["x = 1", "def f():\n    return 1 / 0\nprint('so far')\nf()", "f()", "x"],
    "an exception with a cause": ["try:\n    {}['a']\nexcept KeyError as e:\n    raise ValueError('no') from e"],
    "an exception that cannot be shown": ["class E(Exception):\n    def __str__(self): raise self", "raise E"],
    "a syntax error": ["def", "x = 1\n  y", "'" * 3],
    "other texts": ["print('d\u00e9j\u00e0 \u2028 vu')", "'\\ud800'", "print('\\ud800')", "x = '\ud800'", "\0"],
    "much output": ["print('x' * 50_000)", "1"],
    "leaving politely": ["x = 1", "import sys; sys.exit(3)", "x", "raise SystemExit", "exit()", "x"],
    "leaving": ["x = 1", "print('so far', flush=True)\nimport os; os._exit(3)", "x", "1"],
    "a signal": ["import os; os.kill(os.getpid(), 9)", "1"],
    "a fork": ["import os\nif os.fork() == 0:\n    x = 'child'\nelse:\n    os.wait(); x = 'parent'", "x"],
    "no time left": ["x = 1", ("run", ["print('begun')\nwhile True: pass"], {"seconds": 1.0}), "x", "1"],
    "memory": ["x = 1", "y = bytearray(1 << 33)", "x"],
    "input": ["input()"],
    "files": ["open('a', 'w').write('kept')", "open('a').read()", "import os; os.listdir('.')"],
    "where it is": ["import os, sys; sys.argv, __name__, sorted(os.environ), os.getcwd() == os.environ['HOME']"],
    "asking nobody": ["import host", "try: host.ask('a')\nexcept RuntimeError as e: print(e)"],
    "a call": [DEFINED, ("call", ["change", [[1, 2]], {"b": [3]}], {}), ("call", ["change", [[]], {"b": 3}], {})],
    "other ends of calls": [
        DEFINED, ("call", ["fail"], {}), ("call", ["numbers", [3]], {}), ("call", ["strange"], {}),
        ("call", ["len", ["abc"]], {}), ("call", ["missing"], {}), ("call", ["DEFINED"], {}),
        "def leave(): import os; os._exit(0)", ("call", ["leave"], {}), ("call", ["fail"], {}),
    ],
    "broken streams": ["import sys; sys.stdout.close()", "print(1)", "1"],
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_it_is_as_on_this_machine(name: str, here: InterpreterPool, at_service: RemoteSandbox) -> None:
    results = []
    for pool in (here, at_service):
        with pool.interpreter() as it:
            steps = [("run", [step], {}) if isinstance(step, str) else step for step in SAME[name]]
            results.append([_plain(told(getattr(it, do)(*given, **named))) for do, given, named in steps])
            assert it.calls == len(steps)
    assert results[1] == results[0]


def _plain(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Iterators are equal to none."""
    *others, value = parts
    if isinstance(value, dict) and hasattr(value.get("result"), "__next__"):
        value = {**value, "result": list(value["result"])}
    return *others, value


def test_what_is_repeated_goes_the_same_way(running: Service, at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        begun, account = len(running.requests), usage.Account()
        shown = it.run("import random\nx = [random.random(), *{'a', 'b', 'c', 'd', 'e', 'f'}]\nprint('once'); x").output
        assert it.run("x").output == shown.removeprefix("once\n"), "silent, and with the same values"
        assert len(running.requests) - begun == account.take()["sandbox/remote"] == 2


def test_earlier_calls_take_their_time_again(at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        it.run("import time; time.sleep(1)")
        late = it.run("print('begun')", seconds=0.7)
        assert (late.outcome, late.output) == (Outcome.TIMEOUT, "")
        assert "before it began" in (late.error or "")
        assert it.run("'time' in globals()").state_lost
        assert it.losses == 1


def test_files_go_with_the_variables(at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        it.run("open('a', 'w').close()")
        assert it.run("open('a').read()").output == "''\n"
        it.run("import os; os._exit(0)")
        assert "FileNotFoundError" in (it.run("open('a')").error or "")


def test_a_process_that_is_left_behind_takes_the_time_and_not_the_answer(at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        result = it.run("import subprocess\nx = subprocess.Popen(['sleep', '60'])\n'done'", seconds=1.0)
        assert (result.output, result.outcome) == ("'done'\n", Outcome.FINISHED)


def test_what_is_too_large_is_said_to_be(at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        it.run("def large(n): return 'x' * n")
        assert it.call("large", [900_000]).value == {"result": "x" * 900_000, "arguments": [900_000]}
        said = it.call("large", [1_000_001]).value
        assert said == {"unusable": "a value of more than 1000000 bytes"}


FORGED = {
    "a value that is none": b'\n{"error": null, "value": {"result": {"int": "zz"}, "arguments": []}}\n',
    "an answer of a strange form": b'\n{"error": [], "kind": {}, "value": 7}\n',
    "a strange kind": b'\n{"error": "x", "kind": []}\n',
    "a question": b'\n{"ask": "what is expected?"}\n',
    "that it failed": b'\n{"failed": "no score, please"}\n',
    "much depth": b"\n" + b'{"a":' * 100_000 + b"\n",
    "no text": b"\xff\xfe\n",
    "half a line": b'{"error": ',
    "a long number": b'\n{"error": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", FORGED)
def test_code_that_writes_the_report_itself_harms_itself_alone(name: str, at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        it.run(
            f"import os\ndef write(leave):\n    for n in range(3, 20):\n        try: os.write(n, {FORGED[name]!r})\n"
            "        except OSError: pass\n    if leave: os._exit(0)\n    return 'mine'"
        )
        for leave in (True, False):
            result = it.call("write", [leave])
            assert result.value is None or result.value.get("result", "mine") == "mine"
            assert isinstance(result.error, str | None)
        assert isinstance(it.run("1 + 1").output, str)
    with at_service.interpreter() as it:
        assert it.run("1 + 1").output == "2\n"


def test_code_at_a_service_asks_the_host(at_service: RemoteSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    with at_service.interpreter() as it:
        asked: list[str] = []

        def answer(question: str) -> str:
            asked.append(question)
            return question.upper()

        result = it.run("import host\nprint('once')\nx = host.ask('a') + host.ask('\\ud800')\nx", answer=answer)
        assert (result.output, result.error) == ("once\n'A\\ud800'\n", None)
        assert it.run("x", answer=answer).output == "'A\\ud800'\n"
        assert asked == ["a", "\ud800"], "each question is asked once"

        def fails(question: str) -> str:
            raise LookupError(question)

        with pytest.raises(LookupError):
            it.run("host.ask('c')", answer=fails)
        assert it.run("x[0]").output == "'A'\n", "nothing is lost by it"
        with pytest.raises(SandboxError, match="something else when it is run again"):
            it.run("import time\nhost.ask(str(time.time_ns())); host.ask('b')", answer=answer)
        with pytest.raises(SandboxError, match="more than 1000000 bytes at once"):
            it.run("host.ask('x' * 1_000_000)", answer=answer)
        monkeypatch.setattr("rehearsal.sandbox.remote._MOST_QUESTIONS", 3)
        assert it.run("[host.ask('a') for _ in range(3)][-1]", answer=answer).output == "'A'\n"
        with pytest.raises(SandboxError, match="more than 3 times"):
            it.run("[host.ask('a') for _ in range(4)]", answer=answer)


def test_a_service_that_fails_in_the_middle(running: Service, at_service: RemoteSandbox) -> None:
    with at_service.interpreter() as it:
        it.run("x = 1")
        try:
            running.answer = lambda request: (500, {})
            with pytest.raises(SandboxError, match="status 500"):
                it.run("x = 2")
            running.answer = lambda request: (200, {"status": "SandboxError", "message": "no room"})
            with pytest.raises(SandboxError, match="no room"):
                it.run("x = 3")
            running.answer = really
            assert it.run("x").output == "1\n", "what was never run is not run again, and nothing else is lost"
            running.answer = lambda request: (200, finished(status="Error"))
            gone = it.run("x")
            assert gone.outcome is Outcome.GONE and "ended from outside" in (gone.error or "")
        finally:
            running.answer = really
        assert it.run("'x' in globals()").output == "False\n" and it.losses == 1


def test_a_service_that_holds_no_interpreter(service: Service, remote: RemoteSandbox) -> None:
    service.answer = lambda request: (200, finished(127, stderr="bash: python: command not found"))
    with pytest.raises(SandboxError, match=r"hold an interpreter.*command not found"):
        remote.take()
    service.answer = really
    with remote.interpreter() as it, remote.take(timeout=1.0) as other:
        assert (it.run("1").output, other.run("2").output) == ("1\n", "2\n")
    assert len(service.requests) == 1 + 1 + 2, "it is looked at once"
    service.close()
    with RemoteSandbox(service.url, attempts=1) as nowhere, pytest.raises(SandboxError, match="is it running"):
        nowhere.take()


def test_many_at_a_service(at_service: RemoteSandbox) -> None:
    def episode(number: int) -> str:
        with at_service.interpreter() as it:
            it.run(f"x = {number}")
            return it.run("x").output

    with ThreadPoolExecutor(8) as threads, at_service.interpreter() as shared:
        assert list(threads.map(episode, range(16))) == [f"{number}\n" for number in range(16)]
        shared.run("n = 0")
        list(threads.map(lambda _: shared.run("n += 1"), range(8)))
        assert shared.run("n").output == "8\n"


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_a_service_has_a_python_of_its_own(version: str, service: Service) -> None:
    """Also what is sent there later."""
    python = next((path for path in _pythons(version) if _runs(path)), None)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    service.answer = functools.partial(really, python=python)
    with RemoteSandbox(service.url, limits=SMALL) as remote, remote.interpreter() as it:
        assert it.run("import sys; print(sys.version.split('.')[:2])").output == f"{version.split('.')}\n"
        for module in (code_judge, inside):
            assert it.run(Path(module.__file__).read_text()).error is None
        values: list[Any] = [1, 2**70, 1.5, "a", b"b", (1, [2]), {3}, {"k": None}, range(2), bytearray(b"c"), 1j]
        it.run("def same(*values): return list(values)")
        assert (it.call("same", values).value or {}).get("result") == values
        tests = "assert f([2]) == 4 and f([1], k={'b'}) == 3"
        asked: list[str] = []

        def answer(question: str) -> str:
            asked.append(question)
            return '{"result": 4, "arguments": [[5]]}' if len(asked) == 1 else '{"raised": "KeyError", "said": "x"}'

        report = (it.call("judge", [tests, "", ["f"], False], answer=answer).value or {})["result"]
        assert (report["passed"], report["total"], len(asked)) == (0, 1, 2) and "KeyError" in report["failure"]
        said = it.call("trial", ["f", "def f(x):\n    return [x, {x}]", [[1]], 100, 1.0, 2.0]).value or {}
        assert said["result"]["answers"] == ['{"value": [1, {"set": [1]}]}']


def _pythons(version: str) -> list[str]:
    found = shutil.which(f"python{version}")
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{version}.*/bin/python")
    return [*([found] if found else []), *map(str, installed)]


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
