"""The walls: namespaces in which the rest of the system does not exist.

There are two. The outer one is built once, by :func:`enclose` or by bubblewrap, and has a root folder that holds the
system's libraries and Python's installation read-only and nothing else, no network, and processes of its own. Each cell
has another one inside of it, by :func:`enclose_cell`, with a scratch folder in memory, an empty ``/proc`` and a
namespace of processes whose end is the end of everything in the cell, whatever it did to hide.

The order of mounting follows bubblewrap's (github.com/containers/bubblewrap, ``bubblewrap.c``).
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from typing import Any

from rehearsal.sandbox.inside import landlock, libc, seccomp

DEVICES = ("null", "zero", "full", "random", "urandom")
_MOST_FILES = 10_000
_GUEST_ID = 1000
_PROCESS_LIMITS = ("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO")


def become(user: int) -> None:
    """Be an ordinary user that owns nothing, for good; for a process that was root."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # The kernel forbids a process that changed its user to write its own maps, unless it says that this is no secret.
    libc.prctl(libc.PR_SET_DUMPABLE, 1)


def enclose(readable: Sequence[str], scratch: str, *, privileged: bool) -> None:
    """Build the outer wall around this process, and return in a child that is the first process within.

    The process that called waits for the child and ends with it.

    Args:
        readable: absolute paths, none within another, that are seen inside, read-only. Symbolic links stay such.
        scratch: a folder that is made, for cells to put theirs in its place.
        privileged: the caller is root and needs no namespace of users.

    Raises:
        OSError: if the kernel does not allow it.
    """
    if not privileged:
        _own_users(os.geteuid(), os.getegid(), os.geteuid())
    libc.unshare(libc.NEWNS | libc.NEWPID | libc.NEWIPC | libc.NEWUTS | libc.NEWNET)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(libc.PR_SET_PDEATHSIG, 9)
    libc.hostname("sandbox")
    _new_root(readable, scratch)


def enclose_cell(scratch: str, file_bytes: int) -> None:
    """Build the wall of a cell around this process, and return in a child that is the first process within.

    The process that called ends. See the module's text for what the cell has.

    Args:
        scratch: the folder in whose place a fresh one is put.
        file_bytes: its size.

    Raises:
        OSError: if the kernel does not allow it.
    """
    _own_users(os.geteuid(), os.getegid(), _GUEST_ID)
    libc.unshare(libc.NEWNS | libc.NEWPID | libc.NEWIPC | libc.NEWUTS)
    if os.fork():
        os._exit(0)
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    flags = libc.MS_NOSUID | libc.MS_NODEV
    size = f"size={file_bytes},nr_inodes={_MOST_FILES},mode=0700"
    libc.mount("scratch", scratch, "tmpfs", flags, size)


def hide_processes() -> None:
    """Cover ``/proc`` with an empty folder: within a cell nothing needs it, and it tells of everything."""
    libc.mount("nothing", "/proc", "tmpfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_RDONLY, "size=4k")


def restrain(limits: dict[str, Any], *, nested: bool, allowed: tuple[Sequence[str], Sequence[str]] | None) -> None:
    """Take from this process, for good, what a guest does not need. What it cannot take is an error.

    Args:
        limits: as :class:`rehearsal.sandbox.Limits` has them, with ``cpu_seconds`` (None for no limit of its own),
            ``own`` (bytes of address space that the bare interpreter has) and ``user_tasks`` (what the user runs
            already, where that counts).
        nested: the process is in a cell with a wall.
        allowed: readable and writable paths for Landlock; None without it.
    """
    libc.prctl(libc.PR_SET_PDEATHSIG, 9)
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    wanted = {
        "RLIMIT_AS": limits["own"] + limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["files"],
        "RLIMIT_NPROC": limits["processes"] + limits["user_tasks"],
    } | dict.fromkeys(_PROCESS_LIMITS, 0)
    if limits["cpu_seconds"] is not None:
        wanted["RLIMIT_CPU"] = limits["cpu_seconds"]
    for name, value in wanted.items():
        which = getattr(resource, name, None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
    libc.drop_capabilities()
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    if allowed is not None:
        landlock.restrict(*allowed)
    if seccomp.is_known():
        keeps_signals = nested or (allowed is not None and landlock.keeps_signals())
        seccomp.install(own_signals_only=not keeps_signals, keep_attributes=allowed is not None)


def _own_users(user: int, group: int, inside: int) -> None:
    """Enter a namespace of users in which this user alone exists, under the number ``inside``."""
    libc.unshare(libc.NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {user} 1"), ("gid_map", f"{inside} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _new_root(readable: Sequence[str], scratch: str) -> None:
    flags = libc.MS_NOSUID | libc.MS_NODEV
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    # A place from which both the old and the new root can be seen: what is to be shown may lie below /tmp itself.
    libc.mount("sandbox", "/tmp", "tmpfs", flags, "size=1m,mode=0755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    libc.mount("/tmp/new", "/tmp/new", flags=libc.MS_BIND | libc.MS_REC)
    libc.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    for path in readable:
        _show(path)
    os.mkdir("/new/dev")
    for name in DEVICES:
        _bind(f"/old/dev/{name}", f"/new/dev/{name}")
    os.makedirs("/new/proc")
    try:
        libc.mount("proc", "/new/proc", "proc", flags | libc.MS_NOEXEC)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        # In a container parts of /proc are covered, and the kernel then gives no new one. The cells hide either.
        libc.mount("/old/proc", "/new/proc", flags=libc.MS_BIND | libc.MS_REC)
    os.makedirs(f"/new{scratch}", exist_ok=True)
    os.mkdir("/new/.old")
    libc.pivot_root("/new", "/new/.old")
    os.chdir("/")
    libc.detach("/.old")
    os.rmdir("/.old")
    libc.mount("none", "/", flags=libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY | flags)


def _show(path: str) -> None:
    source, target = f"/old{path}", f"/new{path}"
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
    elif os.path.exists(source):
        _bind(source, target)
        libc.lock_mount(target)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    libc.mount(source, target, flags=libc.MS_BIND | libc.MS_REC)
