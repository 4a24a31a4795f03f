"""Landlock: a process forbids itself, and all that it will start, files outside of a few folders.

It needs no namespace and no privilege, but a kernel from 5.13 on that has it switched on. From 6.12 on it also keeps
signals and abstract sockets inside. See landlock(7) and the kernel's ``userspace-api/landlock``.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Sequence

from rehearsal.sandbox.inside import libc

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION = 1
_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_BY_VERSION = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights over files that each version of the interface knows beside the former ones."""
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15
_TCP = 3
_SCOPES = 3
"""Abstract sockets and signals."""


def version() -> int:
    """Of the kernel's interface; 0 without Landlock."""
    try:
        return libc.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION)
    except OSError:
        return 0


def keeps_signals() -> bool:
    """Whether signals to processes outside are refused."""
    return version() >= 6


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Forbid this process all files but these.

    Args:
        readable: folders and files that may be read and executed.
        writable: folders in which everything may be done, and files that may be read and written.

    Raises:
        OSError: if the kernel does not do it.
    """
    known = version()
    everything = sum(rights for since, rights in _BY_VERSION.items() if since <= known)
    rules = struct.pack("QQQ", everything, _TCP if known >= 4 else 0, _SCOPES if known >= 6 else 0)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    ruleset = libc.syscall(_CREATE, rules, ctypes.c_size_t(size), 0)
    try:
        for path in readable:
            _allow(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(ruleset, path, everything)
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        libc.syscall(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there need not be allowed
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_A_FILE
        # struct landlock_path_beneath_attr is packed
        libc.syscall(_ADD, ruleset, _BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)
