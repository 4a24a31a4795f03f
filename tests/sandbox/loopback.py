"""A sandbox service on loopback that speaks SandboxFusion's API, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_MOST_KEPT = 1 << 20
"""Bytes that SandboxFusion keeps of a stream."""


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

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def finished(code: int = 0, status: str = "Finished", stdout: str = "", stderr: str = "") -> dict[str, Any]:
    run = {"status": status, "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": stderr}
    return {"status": "Success" if code == 0 else "Failed", "message": "", "compile_result": None, "run_result": run}


def really(request: dict[str, Any], python: str = sys.executable) -> tuple[int, Any]:
    """Run the program of a request as SandboxFusion does without isolation (``sandbox/runners/base.py``): from a file
    in a folder that is removed afterwards, with the environment of the service, in a session of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as stdin:
        file = Path(folder, "tmpfile.py")
        file.write_text(request["code"], encoding="utf-8")
        stdin.write(request["stdin"].encode())
        stdin.seek(0)
        limited = ["sh", "-c", f'ulimit -v {request["memory_limit_MB"] << 10}; exec "$0" "$@"']
        process = subprocess.Popen(
            [*limited, python, str(file)], cwd=folder, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env={**os.environ, "SECRET_OF_THE_SERVICE": "1"},
        )  # fmt: skip
        try:
            streams, status = process.communicate(timeout=request["run_timeout"]), "Finished"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            streams, status = process.communicate(), "TimeLimitExceeded"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr = (_text(stream[:_MOST_KEPT]) for stream in streams)
    return 200, finished(process.returncode, status, stdout, stderr)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return f"[DecodeError] {error}"


@contextlib.contextmanager
def running_service() -> Iterator[Service]:
    """A service that really runs what it is sent."""
    with contextlib.closing(Service()) as made:
        made.answer = really
        yield made
