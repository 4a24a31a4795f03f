"""A sandbox service behind the same interface, against one that this test starts on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rehearsal.errors import SandboxError
from rehearsal.sandbox import Limits, Outcome, RemoteSandbox


class Service:
    """Answers ``POST /run_code`` with what ``answer`` makes of the request: a status and a body."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = lambda request: (200, finished())
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append({"path": self.path, **request})
                service.headers.append(dict(self.headers))
                status, body = service.answer(request)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def finished(code: int = 0, status: str = "Finished", stdout: str = "", stderr: str = "") -> dict[str, Any]:
    run = {"status": status, "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": stderr}
    return {"status": "Success" if code == 0 else "Failed", "message": "", "compile_result": None, "run_result": run}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Service()
    yield made
    made.server.shutdown()
    made.server.server_close()


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
