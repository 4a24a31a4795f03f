"""The trusted process of a cell: it starts the guest, watches it, and alone talks to the host.

It has the limits enforced: the clock, the memory and number of all processes of the cell together, and the amount of
output, which is cut and drained. Between the calls of an interpreter everything in the cell is stopped, so that nothing
goes on behind the host's back. The guest can break its own pipes and with them its own call, and no more: the warden is
the first process of its namespace, which no signal from within ends, or, without namespaces, another session.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rehearsal.sandbox.inside import guest, libc, processes, wall
from rehearsal.sandbox.inside.framing import FramingError, Message, Unpacker, pack

LARGEST_FROM_HOST = 1 << 28
LARGEST_FROM_GUEST = 1 << 23
"""Bytes of a message: of a value that a call returns, or of a question to the host."""
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_FIRST_LOOK = 0.05
_PIECE = 1 << 16
_MOST_LEFT_IN_PIPES = 64
"""Pieces that are read of a pipe after the end: more than it holds, unless someone goes on writing."""
_CALLS = ("run", "call")
_READABLE_DEVICES = tuple(f"/dev/{name}" for name in ("zero", "full", "random", "urandom"))


class HostGone(Exception):
    """The host has closed its socket: the cell ends."""


class _Output:
    """What a guest writes, up to a limit; the rest is read and forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.clear()

    def clear(self) -> None:
        self._kept = bytearray()
        self.cut = False

    def feed(self, data: bytes) -> None:
        room = self._limit - len(self._kept)
        self._kept += data[:room]
        self.cut = self.cut or len(data) > room

    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")


class _Guest:
    """A guest process, seen from its warden.

    Attributes:
        pid: its number here.
        ended: a descriptor that becomes readable when it ends.
        requests, results: pipes to and from it.
        pipes: where its output comes from, and what becomes of it.
        unsent: bytes that wait until it reads.
        open: of these pipes, those that somebody may still write to.
        status: as waitpid(2) has it, once it has ended.
    """

    def __init__(self, pid: int, requests: int, results: int, pipes: dict[int, _Output]) -> None:
        self.pid = pid
        self.ended = os.pidfd_open(pid)
        self.requests, self.results, self.pipes = requests, results, pipes
        self.unpacker = Unpacker(LARGEST_FROM_GUEST)
        self.unsent = b""
        self.open = {results, *pipes}
        self.status: int | None = None
        for descriptor in (requests, results, *pipes):
            os.set_blocking(descriptor, False)

    def close(self) -> None:
        for descriptor in (self.ended, self.requests, self.results, *self.pipes):
            os.close(descriptor)

    def drain(self) -> None:
        """Read what lies in the pipes of output."""
        for descriptor, output in self.pipes.items():
            for _ in range(_MOST_LEFT_IN_PIPES):
                data = _read(descriptor)
                if not data:
                    break
                output.feed(data)


class Warden:
    """See the module's text.

    Args:
        host: the socket to the host.
        limits: the fields of :class:`rehearsal.sandbox.Limits`.
        settings: of the zygote.
    """

    def __init__(self, host: socket.socket, limits: dict[str, Any], settings: dict[str, Any]) -> None:
        self._host, self._limits = host, dict(limits)
        self._nested: bool = settings["nested"]
        self._settings = settings
        self._unpacker = Unpacker(LARGEST_FROM_HOST)
        self._waiting: list[Message] = []
        self._guest: _Guest | None = None
        self._number = 0
        self._lost = False
        os.setsid()
        self._proc = os.open(processes.PROC, os.O_RDONLY | os.O_DIRECTORY)
        self._pid_in_proc = processes.own_number(self._proc)
        counted_apart = self._nested and _kernel() >= (5, 14)
        self._limits["user_tasks"] = 2 if counted_apart else processes.tasks_of_user(os.geteuid(), self._proc)
        with open("/proc/self/statm", encoding="ascii") as file:
            self._limits["own"] = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        if self._nested:
            wall.hide_processes()
            self._scratch = settings["scratch"]
        else:
            libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
            self._scratch = tempfile.mkdtemp(prefix="cell-", dir=settings["scratch"])
        libc.prctl(libc.PR_SET_DUMPABLE, 0)

    def serve(self) -> None:
        """Do what the host says until it is gone."""
        try:
            while True:
                message = self._next_message()
                if message["do"] == "start":
                    self._start(guest.interpreter, merged=True)
                elif message["do"] == "program":
                    self._tell(self._program(message))
                elif message["do"] in _CALLS:
                    self._tell(self._call(message))
        except (HostGone, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self._end_everything()
            if not self._nested:
                _remove(self._scratch)

    # --- what the host asks for ---------------------------------------------------------------------------------------

    def _call(self, message: Message) -> Message:
        """Run source, or call a function, in the interpreter."""
        if self._guest is None:
            self._start(guest.interpreter, merged=True)
        assert self._guest is not None
        lost, self._lost = self._lost, False
        self._guest.drain()  # of what ran on after the last call; nobody asked for it
        for pipe in self._guest.pipes.values():
            pipe.clear()
        self._continue()
        self._number += 1
        self._guest.unsent += pack({key: message[key] for key in message if key != "seconds"} | {"n": self._number})
        outcome, answer = self._watch(message["seconds"])
        status = self._finish(outcome, forever=outcome != "finished")
        error, kind = answer.get("error"), answer.get("kind")
        if outcome == "finished" and error is not None:
            outcome = "memory" if kind == "MemoryError" else "raised"
        ((_, output),) = status.pipes.items()
        return self._report(outcome, status, output, None, lost) | {"error": error, "value": answer.get("value")}

    def _program(self, message: Message) -> Message:
        """Run a program once, in a process of its own."""
        for name, content in message["files"].items():
            path = os.path.join(self._scratch, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(base64.b64decode(content))
        self._limits["cpu_seconds"] = 4 * int(message["seconds"] + 1)

        def run(requests: int, results: int) -> None:
            guest.program(message["source"], results)

        self._start(run, merged=False, stdin=message["stdin"].encode("utf-8", "surrogatepass"))
        outcome, answer = self._watch(message["seconds"], until_end=True)
        done = self._finish(outcome, forever=True)
        if outcome == "exited":
            status = os.waitstatus_to_exitcode(done.status or 0)
            outcome = "finished" if status == 0 else "memory" if answer.get("kind") == "MemoryError" else "raised"
        out, err = done.pipes.values()
        return self._report(outcome, done, out, err, False) | {"error": answer.get("kind")}

    def _report(self, outcome: str, done: _Guest, out: _Output, err: _Output | None, lost: bool) -> Message:
        if outcome == "finished" and (out.cut or (err is not None and err.cut)):
            outcome = "output"
        status = None if done.status is None else os.waitstatus_to_exitcode(done.status)
        texts = {"output": out.text(), "errors": err.text() if err is not None else ""}
        return {"said": "done", "outcome": outcome, "status": status, "lost": lost, "cut": out.cut, **texts}

    # --- the guest ----------------------------------------------------------------------------------------------------

    def _start(self, work: Callable[[int, int], None], *, merged: bool, stdin: bytes = b"") -> None:
        """Fork a guest that does ``work(requests, results)``."""
        inputs = _file_of(stdin) if stdin else os.open(os.devnull, os.O_RDONLY)
        requests, results, out = os.pipe(), os.pipe(), os.pipe()
        err = out if merged else os.pipe()
        limits = {"cpu_seconds": None, **self._limits}
        pid = os.fork()
        if pid == 0:
            try:
                _place([inputs, out[1], err[1], requests[0], results[1]])
                os.setsid()
                signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the host has blocked some, for all but its guests
                guest.make_home(self._scratch)
                wall.restrain(limits, nested=self._nested, allowed=self._allowed())
                work(3, 4)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"the sandbox could not start this: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(70)
        for descriptor in {inputs, requests[0], results[1], out[1], err[1]}:
            os.close(descriptor)
        limit = self._limits["output_bytes"]
        pipes = {out[0]: _Output(limit)} | ({} if merged else {err[0]: _Output(limit)})
        self._guest = _Guest(pid, requests[1], results[0], pipes)

    def _allowed(self) -> tuple[list[str], list[str]] | None:
        if not self._settings["landlock"]:
            return None
        readable = [*self._settings["readable"], *_READABLE_DEVICES]
        return readable, [self._scratch, os.devnull]

    def _watch(self, seconds: float, *, until_end: bool = False) -> tuple[str, Message]:
        """Wait until the guest has answered or ended, or a limit is passed; what happened, and what it said last."""
        running = self._guest
        assert running is not None
        begun = time.monotonic()
        deadline, look = begun + seconds, begun + _SECONDS_TO_FIRST_LOOK
        said: Message = {}
        poll = select.poll()
        for descriptor in (self._host.fileno(), running.ended, *running.open):
            poll.register(descriptor, select.POLLIN)
        while True:
            if running.unsent:
                poll.register(running.requests, select.POLLOUT)
            now = time.monotonic()
            if now >= deadline:
                return "timeout", said
            if now >= look:
                look = now + _SECONDS_BETWEEN_LOOKS
                excess = self._beyond_limits()
                if excess:
                    return excess, said
            ready = {descriptor for descriptor, _ in poll.poll(1000 * max(0.0, min(deadline, look) - now) + 1)}
            data = {descriptor: _read(descriptor) for descriptor in ready & running.open}
            for descriptor in (descriptor for descriptor, read in data.items() if read == b""):
                # All its writers are gone; it would be ready for ever.
                poll.unregister(descriptor)
                running.open.discard(descriptor)
            for descriptor, output in running.pipes.items():
                output.feed(data.get(descriptor) or b"")
            if running.requests in ready:
                self._send_on(running, poll)
            if self._host.fileno() in ready:
                self._answer(running)
            try:
                messages = running.unpacker.feed(data.get(running.results) or b"")
            except FramingError:
                return "broken", {}
            for message in messages:
                if isinstance(message.get("ask"), str):
                    self._tell({"said": "ask", "text": message["ask"]})
                elif message.get("n") == self._number and _is_answer(message):
                    said = message
                    if not until_end:
                        return "finished", said
                else:
                    return "broken", {}
            if running.ended in ready and not data.get(running.results):
                _, running.status = os.waitpid(running.pid, 0)
                return ("killed" if os.WIFSIGNALED(running.status) else "exited"), said

    def _send_on(self, running: _Guest, poll: select.poll) -> None:
        try:
            sent = os.write(running.requests, running.unsent[:_PIECE])
            running.unsent = running.unsent[sent:]
        except BlockingIOError:
            return
        except OSError:
            running.unsent = b""  # it has closed its end, and will be found to have ended or to say nothing
        if not running.unsent:
            poll.unregister(running.requests)

    def _answer(self, running: _Guest) -> None:
        """The host speaks while a call runs: it answers a question."""
        self._receive()
        while self._waiting:
            message = self._waiting.pop(0)
            if message["do"] == "answer":
                running.unsent += pack(message)

    def _beyond_limits(self) -> str | None:
        used = processes.usage(self._pid_in_proc, self._proc)
        if used.tasks > self._limits["processes"] + 1:
            return "processes"
        return "memory" if used.memory_bytes > self._limits["memory_bytes"] + self._limits["own"] else None

    def _finish(self, outcome: str, *, forever: bool) -> _Guest:
        """After a call: stop the cell or, after a bad end, end it. What was written is read either way."""
        done = self._guest
        assert done is not None
        if forever:
            self._end_everything()
            self._lost = True
            self._guest = None
        else:
            done.drain()
            self._stop()
            done.drain()
        return done

    def _stop(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def _continue(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        assert self._guest is not None
        with contextlib.suppress(OSError):
            if self._nested:
                os.kill(-1, number)  # everybody in the namespace but this process
            else:
                os.killpg(self._guest.pid, number)

    def _end_everything(self) -> None:
        """End every process of the cell, and read what it had written."""
        if self._nested:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            processes.kill_below(os.getpid())
        ended = self._guest
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, 0)
                if ended is not None and pid == ended.pid:
                    ended.status = status
        if ended is not None:
            ended.drain()
            ended.close()

    # --- the host -----------------------------------------------------------------------------------------------------

    def _next_message(self) -> Message:
        while not self._waiting:
            self._receive()
        return self._waiting.pop(0)

    def _receive(self) -> None:
        data = self._host.recv(_PIECE)
        if not data:
            raise HostGone
        self._waiting += self._unpacker.feed(data)

    def _tell(self, message: Message) -> None:
        self._host.sendall(pack(message))


def _kernel() -> tuple[int, ...]:
    """The first two numbers of the kernel's version. From 5.14 on, tasks are counted by namespace of users."""
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


def _is_answer(message: Message) -> bool:
    return all(isinstance(message.get(key), str | None) for key in ("error", "kind"))


def _read(descriptor: int) -> bytes | None:
    """A piece of a pipe; None if there is nothing yet, nothing at its end."""
    try:
        return os.read(descriptor, _PIECE)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _file_of(content: bytes) -> int:
    """A descriptor from which this can be read; a file without a name, so that a guest can seek in its input."""
    descriptor = os.memfd_create("stdin")
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _remove(folder: str) -> None:
    """Remove a folder, also where folders in it were closed to their owner. Nobody is left who could change them."""
    for path, names, _ in os.walk(folder):
        for name in names:
            inner = os.path.join(path, name)
            if not os.path.islink(inner):
                with contextlib.suppress(OSError):
                    os.chmod(inner, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _place(descriptors: list[int]) -> None:
    """Make these the descriptors 0, 1, 2, ... and close all others."""
    # By way of high numbers, because one of them may have the number of another's place.
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in descriptors]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place)
    os.closerange(len(descriptors), 1 << 16)
