"""Which levels of isolation this system offers, and why not the others."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from rehearsal.errors import SandboxError
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import Limits, Outcome
from rehearsal.sandbox.program import run_in
from rehearsal.sandbox.zygote import Zygote

_HOW_TO_GET = {
    Isolation.BUBBLEWRAP: "install bubblewrap (on Debian and Ubuntu: apt-get install bubblewrap) and allow user "
    "namespaces",
    Isolation.NAMESPACES: "allow user namespaces (user.max_user_namespaces above 0, no AppArmor or seccomp profile "
    "that forbids them; in a container, start it with that allowed) on Linux 5.12 or newer",
    Isolation.FILTERS: "use Linux 5.13 or newer with Landlock switched on, on x86-64 or aarch64",
    Isolation.RLIMITS: "use Linux 5.3 or newer, as an ordinary user or with a Python that every user may read",
}

_lock = threading.Lock()
_found: dict[str | None, Mapping[Isolation, str]] = {}


def available(python: str | None = None) -> Mapping[Isolation, str]:
    """What this system offers: for each level the empty text, or the reason why it is not to be had.

    Each level is started and looks around once; the answer is kept for the life of this process.

    Args:
        python: the Python to run inside; this one if None.
    """
    with _lock:
        if python not in _found:
            _found[python] = MappingProxyType({level: _probe(level, python) for level in Isolation})
        return _found[python]


def strongest(python: str | None = None) -> Isolation:
    """The strongest level that this system offers.

    Raises:
        SandboxError: if it offers none.
    """
    offered = [level for level, reason in available(python).items() if not reason]
    if not offered:
        reason = available(python)[Isolation.RLIMITS]
        raise SandboxError(f"Programs cannot be run safely here ({reason}); {_HOW_TO_GET[Isolation.RLIMITS]}.")
    return max(offered)


def require(level: Isolation | str | None, python: str | None = None) -> Isolation:
    """The level to use.

    Args:
        level: the weakest that is good enough, or its name; it is used itself. The strongest one there is if None.
        python: the Python to run inside; this one if None.

    Raises:
        SandboxError: if the system does not offer the level, with a sentence that says how to get it.
    """
    if level is None:
        return strongest(python)
    try:
        level = Isolation(level)
    except ValueError as error:
        names = ", ".join(one.value for one in Isolation)
        raise SandboxError(f"There is no level of isolation {level!r}; there are {names}.") from error
    reason = available(python)[level]
    if reason:
        raise SandboxError(
            f"Isolation by {level.value} is not to be had here ({reason}); {_HOW_TO_GET[level]}, or ask for less."
        )
    return level


def _probe(level: Isolation, python: str | None) -> str:
    """Start a sandbox and see whether it holds what the level promises; why not, or nothing."""
    if not hasattr(os, "pidfd_open"):
        return "this is not Linux"
    if level is Isolation.BUBBLEWRAP and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        with Zygote(level, python=python) as zygote, tempfile.TemporaryDirectory(prefix="rehearsal-probe-") as folder:
            os.chmod(folder, 0o755)
            Path(folder, "readable").touch(0o644)
            result = run_in(zygote, _LOOK, stdin=f"{folder}/readable", limits=Limits(seconds=10))
    except SandboxError as error:
        return str(error).rstrip(".")
    if result.outcome is not Outcome.FINISHED:
        return f"a program in it ended with {result.outcome.value}: {(result.stderr.splitlines() or ['nothing'])[-1]}"
    seen = set(result.stdout.split())
    promised = {
        Isolation.RLIMITS: set(),
        Isolation.FILTERS: {"no-network", "no-files"},
        Isolation.NAMESPACES: {"no-network", "no-files", "no-processes"},
        Isolation.BUBBLEWRAP: {"no-network", "no-files", "no-processes"},
    }[level]
    missing = ", ".join(word.removeprefix("no-") for word in sorted(promised - seen))
    return f"a program in it was not kept from: {missing}" if missing else ""


_LOOK = """
import os
try:
    import socket
    socket.socket()
except OSError:
    print("no-network")
try:
    open(input())
except OSError:
    print("no-files")
if os.getppid() <= 1 and not os.path.exists("/proc/1"):
    print("no-processes")
"""
