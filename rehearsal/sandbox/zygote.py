"""The host's side of a zygote: how it is started at each level of isolation, and how cells are asked of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehearsal import signals
from rehearsal.errors import SandboxError
from rehearsal.sandbox.inside import landlock, seccomp
from rehearsal.sandbox.inside.wall import DEVICES
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import Limits

_HERE = Path(__file__).resolve().parent
TRIES = 3
"""How often a cell is asked for where zygotes end as soon as they have begun."""
_SECONDS_TO_START = 60.0
_SECONDS_TO_LEAVE = 5.0
_SECONDS_BETWEEN_LOOKS = 0.002
_SECONDS_BETWEEN_TRIES = 0.25
_ROOTS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
_SINGLE_FILES = ("/etc/ld.so.cache", "/etc/localtime")
_BOOT = """
import sys, types
for name, folders in (("rehearsal", []), ("rehearsal.sandbox", [sys.argv[1]])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = folders
from rehearsal.sandbox.inside.zygote import main
main(int(sys.argv[2]))
"""
_SCRATCHES = ("/tmp", "/scratch", "/home/guest/scratch")
"""Where the files of a cell with walls may lie: the first that hides nothing that is needed."""
_SETUID, _SYS_ADMIN = 7, 21
_STAND_IN = 1_879_048_192
"""Where numbers of users begin that nobody has, if all numbers are to be had."""


class Zygote:
    """A running zygote. Thread-safe. Close it after use; it also ends with this process.

    Args:
        isolation: the level to build; that it is to be had is the caller's to know.
        packages: folders of packages that programs may import, beside the standard library.
        preload: modules that are imported once, before any program.
        python: the Python to run inside, 3.9 or newer; this one if None.

    Raises:
        SandboxError: if it does not start.
    """

    def __init__(
        self, isolation: Isolation, *, packages: Sequence[str | os.PathLike[str]] = (), preload: Sequence[str] = (),
        python: str | None = None,
    ) -> None:  # fmt: skip
        self.isolation = isolation
        self._lock = threading.Lock()
        self._closed = False
        self._deaf = False
        self._last_words: list[str] = []
        executable, prefix = _python(python)
        folders = [os.path.realpath(folder) for folder in packages]
        for folder in folders:
            if not os.path.isdir(folder):
                raise SandboxError(f"There is no folder {folder} to take packages from.")
        readable = _outermost([*_ROOTS, *_SINGLE_FILES, prefix, str(_HERE / "inside"), *folders])
        nested = isolation >= Isolation.NAMESPACES
        stand_in = _stand_in()
        if not nested and os.geteuid() == 0:
            stand_in = self._checked_stand_in(stand_in, [executable, str(_HERE), *folders])
        if isolation is Isolation.FILTERS and not (seccomp.is_known() and landlock.version()):
            raise SandboxError("The kernel has no Landlock, or the processor's system calls are not known.")
        inside = next(place for place in _SCRATCHES if not any(f"{path}/".startswith(f"{place}/") for path in readable))
        self._scratch = "" if nested else tempfile.mkdtemp(prefix="rehearsal-sandbox-")
        if stand_in is not None and self._scratch:
            os.chown(self._scratch, stand_in, stand_in)
        settings = {
            "nested": nested, "enclose": isolation is Isolation.NAMESPACES, "become": stand_in, "readable": readable,
            "landlock": isolation is Isolation.FILTERS, "scratch": self._scratch or inside, "packages": folders,
            "preload": list(preload),
        }  # fmt: skip
        self._start([executable, "-I", "-S", "-X", "utf8", "-c", _BOOT, str(_HERE)], readable, settings)

    def cell(self, limits: Limits) -> socket.socket:
        """Ask for a cell; it is made while the caller goes on. Closing the socket ends the cell and all in it.

        Raises:
            SandboxError: if the zygote is gone.
        """
        mine, its = socket.socketpair()
        with its:
            request = json.dumps(dataclasses.asdict(limits)).encode()
            try:
                with self._lock:
                    socket.send_fds(self._control, [request], [its.fileno()])
            except OSError as error:
                mine.close()
                self._deaf = True
                raise SandboxError("The sandbox was ended from outside; make a new one.") from error
        return mine

    @property
    def alive(self) -> bool:
        """Whether it still runs, as far as anybody knows."""
        # The process that was started may be the one around the zygote, and end a little later.
        return not self._closed and not self._deaf and not self._has_ended()

    def close(self) -> None:
        """End it with every cell, and leave no file behind."""
        if self._closed:
            return
        self._closed = True
        self._control.close()
        patience = time.monotonic() + _SECONDS_TO_LEAVE
        while not self._has_ended() and time.monotonic() < patience:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        # Also where what was started has ended: it may be the process around the zygote, killed from outside, and the
        # one within it may be stuck halfway to its walls.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_ended(self) -> bool:
        """Whether the process that was started has ended. It is not fetched: until it is, its number, which is that of
        its group too, goes to no other."""
        if self._process.returncode is not None or not hasattr(os, "waitid"):
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _first_words(self) -> bytes:
        """What the zygote says once its walls stand.

        Raises:
            OSError: if it says nothing in time, or what is around it has ended.
        """
        self._control.settimeout(_SECONDS_BETWEEN_TRIES)
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                return self._control.recv(1 << 16)
            except TimeoutError:
                if self._has_ended():
                    raise OSError("it was ended from outside") from None
                if time.monotonic() > deadline:
                    raise

    def _checked_stand_in(self, stand_in: int | None, paths: Sequence[str]) -> int | None:
        """Root without namespaces becomes another user, if that user can then still read Python."""
        closed = next((path for path in paths if not _open_to_all(path)), None)
        if stand_in is not None and closed is None:
            return stand_in
        if self.isolation is Isolation.RLIMITS:
            raise SandboxError(f"Programs would run as root, because only root may read {closed or 'as another user'}.")
        return None  # Landlock keeps root, without its capabilities, from files as well

    def _start(self, command: list[str], readable: Sequence[str], settings: dict[str, Any]) -> None:
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            command = [*command, str(its.fileno())]
            if self.isolation is Isolation.BUBBLEWRAP:
                privileged = settings["become"] is not None
                command = [*_bubblewrap(readable, settings["scratch"], privileged=privileged), *command]
            try:
                # Stop signals stay blocked in all that is around a guest, bubblewrap too: it ends with its socket.
                with signals.held_back():
                    self._process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                        pass_fds=[its.fileno()], cwd="/", start_new_session=True,
                        env={"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"},
                    )  # fmt: skip
            except OSError as error:
                self._control.close()
                raise SandboxError(f"{command[0]} does not start: {error}.") from error
        threading.Thread(target=self._listen, daemon=True, name="sandbox-errors").start()
        try:
            self._control.settimeout(_SECONDS_TO_START)
            self._control.send(json.dumps(settings).encode())
            answer = json.loads(self._first_words() or b'{"failed": "it ended at once"}')
        except OSError as error:
            answer = {"failed": str(error)}
        self._control.settimeout(None)
        if answer:
            self.close()
            raise SandboxError(f"The sandbox did not start: {' '.join([answer['failed'], *self._last_words[-1:]])}.")

    def _listen(self) -> None:
        """Keep the last lines that the zygote and its wardens write."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_words = [*self._last_words[-9:], line.decode("utf-8", "replace").strip()]


def _bubblewrap(readable: Sequence[str], scratch: str, *, privileged: bool) -> list[str]:
    """The command that builds the outer wall; see bwrap(1).

    It does not tie itself to the thread that started it, as ``--die-with-parent`` would: the zygote leaves when its
    control socket ends.
    """
    words = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--as-pid-1", "--hostname", "sandbox", *([] if privileged else ["--unshare-user"])]
    # Folders on the way to a mount would otherwise be closed to everyone but root.
    on_the_way = {str(parent) for path in readable for parent in Path(path).parents if str(parent) != "/"}
    for folder in sorted(on_the_way):
        words += ["--dir", folder]
    for path in readable:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    words += ["--tmpfs", "/dev"]
    for device in DEVICES:
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return [*words, "--remount-ro", "/dev", "--proc", "/proc", "--dir", scratch, "--remount-ro", "/", "--chdir", "/"]


@functools.lru_cache(maxsize=8)
def _python(chosen: str | None) -> tuple[str, str]:
    """The real path of a Python and the folder of its installation; a virtual environment has neither of its own."""
    if chosen is None:
        executable, prefix = getattr(sys, "_base_executable", sys.executable), sys.base_prefix
    else:
        ask = [chosen, "-I", "-S", "-c", "import sys; print(sys._base_executable); print(sys.base_prefix)"]
        try:
            done = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True)
            executable, prefix = done.stdout.splitlines()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise SandboxError(f"{chosen} is no Python that could be run: {error}.") from error
    return os.path.realpath(executable), os.path.realpath(prefix)


def _outermost(paths: Sequence[str]) -> list[str]:
    """Those that lie in none of the others."""
    return [
        path
        for index, path in enumerate(paths)
        if os.path.lexists(path)
        and not any(path.startswith(f"{other.rstrip('/')}/") for other in paths)
        and path not in paths[:index]
    ]


def _open_to_all(path: str) -> bool:
    """Whether every user may reach and read it."""
    return all(os.stat(parent).st_mode & 0o001 for parent in Path(path).parents) and bool(os.stat(path).st_mode & 0o004)


def _stand_in() -> int | None:
    """For root, the number of a user that nobody is; None for an ordinary user, or root of nothing but its own."""
    if os.geteuid() != 0:
        return None
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        capabilities = int(fields["CapEff"], 16)
        ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, KeyError, ValueError):
        return None
    if not (capabilities >> _SETUID & 1 and capabilities >> _SYS_ADMIN & 1):
        return None
    first, _, count = max(ranges, key=lambda numbers: numbers[2])
    if first + count > _STAND_IN + 65_536:
        return _STAND_IN + os.getpid() % 65_536
    return first + count - 2 if count >= 65_000 else None
