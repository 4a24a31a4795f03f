"""Hostile programs harm nothing, leave nothing behind and stop nothing, at every level of isolation there is."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal.sandbox import InterpreterPool, Outcome

sys.path.insert(0, str(Path(__file__).parent))

from hostile import PROGRAMS, RAN, Hostile
from pools import SMALL, below, eventually, idle_processes


class Host:
    """What a hostile program could want, and whether it got it."""

    def __init__(self, folder: Path) -> None:
        os.chmod(folder.parent, 0o755)
        os.chmod(folder, 0o777)
        self.folder = folder / "open"
        self.folder.mkdir()
        os.chmod(self.folder, 0o777)
        self.file = folder / "file"
        self.file.write_text("the host's own")
        self.file.chmod(0o644)
        self.reached: list[Any] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(str(self.folder / "socket"))
        os.chmod(self.folder / "socket", 0o777)
        self.local.listen()
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams.bind(str(self.folder / "datagrams"))
        self.datagrams.setblocking(False)
        os.chmod(self.folder / "datagrams", 0o777)
        self.libc = ctypes.CDLL(None)
        self.shared = self.libc.shmget(0, 4096, 0o1666)  # IPC_PRIVATE, IPC_CREAT
        for server in (self.server, self.local):
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()

    def names(self) -> str:
        values = {
            "FILE": str(self.file),
            "FOLDER": str(self.folder),
            "PORT": self.server.getsockname()[1],
            "SOCKET": str(self.folder / "socket"),
            "DATAGRAMS": str(self.folder / "datagrams"),
            "SHARED": self.shared,
            "HOST": os.getpid(),
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def close(self) -> None:
        for server in (self.server, self.local, self.datagrams):
            server.close()
        self.libc.shmctl(self.shared, 0, None)  # IPC_RMID

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                self.reached.append(server.accept())
            except OSError:
                return


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    os.environ["SECRET_OF_THE_HOST"] = "SECRET"
    folder = tmp_path_factory.mktemp("host")
    for parent in list(folder.parents)[:3]:
        if parent != Path("/tmp"):
            os.chmod(parent, 0o755)
    made = Host(folder)
    yield made
    made.close()
    del os.environ["SECRET_OF_THE_HOST"]


def test_there_are_enough_of_them() -> None:
    assert len(PROGRAMS) == len({program.name for program in PROGRAMS}) >= 40


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_hostile_program(pool: InterpreterPool, host: Host, program: Hostile) -> None:
    assert eventually(lambda: below(pool) == idle_processes(pool))
    handlers = threading.active_count()
    begun = time.monotonic()
    with pool.interpreter() as episode:
        assert episode.run(host.names() + "kept = 'kept'").outcome is Outcome.FINISHED
        result = episode.run(program.source, seconds=program.seconds)
        assert time.monotonic() - begun < program.seconds + 40, "it held up the host"
        succeeded = "HARM" in result.output
        assert succeeded == program.succeeds(pool.isolation), result
        assert len(result.output.encode()) <= 3 * SMALL.output_bytes
        assert len(result.error or "") < 10_000
        if program.outcomes and not succeeded:
            assert result.outcome in program.outcomes, result
        # The episode goes on, with its state or with a word that it is lost.
        after = episode.run("1 + 1")
        if after.outcome is not Outcome.BROKEN and program.name not in _SPOIL_THEIR_OWN_EPISODE:
            assert after.output == "2\n" and after.outcome is Outcome.FINISHED, after
            survived = result.outcome in RAN or "MemoryError" in (result.error or "")
            assert after.state_lost is not survived, (result, after)
    # Nothing stays: no process, no file outside, no connection, no change for the next episode.
    assert eventually(lambda: below(pool) == idle_processes(pool)), "a process is left"
    assert host.file.read_text() == "the host's own"
    left = sorted(set(os.listdir(host.folder)) - {"socket", "datagrams"})
    for name in left:
        (host.folder / name).unlink()
    assert not left or program.succeeds(pool.isolation)
    assert host.reached == []
    with pytest.raises(BlockingIOError):
        host.datagrams.recv(100)
    assert threading.active_count() <= handlers + 1
    with pool.interpreter() as fresh:
        assert fresh.run("kept").outcome is Outcome.RAISED
        look = fresh.run("import os, json, math, random\nprint(os.listdir('.'), len([1]), json.dumps({'a': 1}))")
        assert look.output == '[] 1 {"a": 1}\n', look


_SPOIL_THEIR_OWN_EPISODE = ("a_daemon_that_talks_on", "patched_built_ins", "output_that_cannot_be_flushed",
                            "hooks_left_for_the_next",
                               "a_call_that_says_it_is_done")  # fmt: skip
"""Later calls of these episodes may fail; what matters is that no other episode notices."""


def test_a_hostile_program_run_as_a_program(pool: InterpreterPool, host: Host) -> None:
    """A few that matter there: leaving, endless ends, output."""
    results = {
        name: pool.run_program(source, limits=type(SMALL)(**{**SMALL.__dict__, "seconds": 1.5}))
        for name, source in {
            "leaving": "import os\nos._exit(0)",
            "endless": "import atexit, time\natexit.register(time.sleep, 60)",
            "flood": "while True: print('x' * 10000)",
            "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
            "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)",
            "crash": "import ctypes\nctypes.string_at(0)",
            "memory": "x = bytearray(1 << 30)",
        }.items()
    }
    assert {name: result.outcome.value for name, result in results.items()} == {
        "leaving": "finished", "endless": "timeout", "flood": "timeout", "thread": "timeout", "daemon": "finished",
        "crash": "killed", "memory": "memory",
    }  # fmt: skip
    assert all(len(result.stdout) <= SMALL.output_bytes for result in results.values())
    assert all(result.isolation == pool.isolation.value for result in results.values())
