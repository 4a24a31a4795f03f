"""The calls to the kernel that Python's standard library has no function for."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

# unshare(2)
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000
NEWUSER, NEWPID, NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000

# mount(2) and mount_setattr(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 0x4000, 0x4_0000
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

# prctl(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
_LAST_CAPABILITY = 63
"""Of the bounding set; those that a kernel does not know are refused and skipped."""

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: object) -> int:
    """A system call by number.

    Raises:
        OSError: what the kernel answered.
    """
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments))


def unshare(flags: int) -> None:
    """Leave the namespaces named by ``flags``."""
    _checked(_libc.unshare(flags))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """As mount(2)."""
    texts = [text.encode() or None for text in (source, target, kind, data)]
    _checked(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), target)


def lock_mount(target: str) -> None:
    """Make a mount and all below it read-only, without devices and without set-user-id programs. Linux 5.12."""
    attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, 0, 0)
    syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))


def pivot_root(new: str, old: str) -> None:
    """Make ``new`` the root and move the former one to ``old``."""
    syscall(_PIVOT_ROOT[platform.machine()], new.encode(), old.encode())


def detach(target: str) -> None:
    """Take a mount away, at the latest when nobody uses it any more."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), target)


def hostname(name: str) -> None:
    """Set the host's name, in a namespace of one's own."""
    _checked(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name))))


def prctl(option: int, *arguments: object) -> int:
    """As prctl(2); arguments that are left out are zero."""
    full = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.prctl(option, *full, *[ctypes.c_ulong(0)] * (4 - len(full))))


def drop_capabilities() -> None:
    """Give up every capability, also those that a set-user-id program could bring back."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the kernel knows no more of them, or there is nothing to give up
    header = struct.pack("Ii", 0x2008_0522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    syscall(_CAPSET[platform.machine()], header, bytes(24))


def _checked(result: int, what: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
