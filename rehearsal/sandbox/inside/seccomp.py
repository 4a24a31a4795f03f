"""A filter of system calls, which no process can take off again and every child inherits.

The filter is a deny-list: whatever Python and numerical libraries use stays, and everything that reaches other
processes, the network, the kernel's configuration or memory that no limit counts is refused with an error. It holds
without any namespace, so that even the weakest level has no network.

A program of the classic Berkeley packet filter sees the architecture, the number of the system call and its six
arguments, and returns what shall happen (see seccomp(2)). An instruction is (code, jump if true, jump if false,
constant); jumps count instructions from the next one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from rehearsal.sandbox.inside import libc

Instruction = tuple[int, int, int, int]

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_FILTER_MODE = 2

_ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_X32 = 0x4000_0000
"""Numbers from here on are the x32 calls of x86-64: a second door to everything, shut."""

_NAMESPACES = 0x7E02_0000
"""The flags of clone(2) that make namespaces."""
_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902
"""Requests of ioctl(2): input pushed back into a terminal is read by whoever reads that terminal next, and the owner of
a descriptor is sent signals."""
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
"""Commands of fcntl(2): the kernel sends any signal, SIGKILL too, to whoever is named as a descriptor's owner."""
_F_SETPIPE_SZ = 1031
_SO_SNDBUF, _SO_SNDBUFFORCE = 7, 32
"""The kernel's buffers count for no limit of a process: they stay as small as they are made, see
:mod:`rehearsal.sandbox.inside.processes`."""
_AF_UNIX = 1
_STREAMS = tuple(1 | flags for flags in (0, 0x800, 0x8_0000, 0x8_0800))
"""SOCK_STREAM, with and without SOCK_NONBLOCK and SOCK_CLOEXEC."""

# name: (number on x86-64, number on aarch64); None where a processor does not have it.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes: their memory, their descriptors, their priority
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "ioprio_set": (251, 30), "setpriority": (141, 140),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    # file systems and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262), "lookup_dcookie": (212, 18), "nfsservctl": (180, 42),
    # the kernel and the machine
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "personality": (135, 92),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "_sysctl": (156, None),
    "create_module": (174, None), "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # keys of the user, which outlive a process
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # memory that neither the limits of a process nor the size of its scratch folder count
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450), "vmsplice": (278, 75),
    # what the user's other processes share by numbers that can be guessed
    "shmat": (30, 196), "shmctl": (31, 195), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_unlink": (241, 181),
}  # fmt: skip

# What Landlock does not keep from files that it closes (landlock(7), "Current limitations"); truncate before Linux 6.2.
_ATTRIBUTES: dict[str, tuple[int | None, int | None]] = {
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469),
    "truncate": (76, 45),
}  # fmt: skip
_MODES_AND_TIMES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip
"""These change nothing and say that they did, since every copy of a file sets them and would fail otherwise."""

_SOCKET, _CLONE, _CLONE3, _IOCTL = (41, 198), (56, 220), (435, 435), (16, 29)
_SOCKETPAIR, _FCNTL, _SETSOCKOPT = (53, 199), (72, 25), (54, 208)
_ABOUT_ITSELF = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
"""Calls whose first argument names a process; 0 is the caller."""
_SIGNALS = {"kill": (62, 129), "tgkill": (234, 131)}


def is_known() -> bool:
    """Whether the numbers of this processor's system calls are known here."""
    return platform.machine() in _ARCHITECTURES and struct.calcsize("P") == 8


def program(machine: str, own_pid: int, *, own_signals_only: bool, keep_attributes: bool) -> list[Instruction]:
    """The filter's instructions.

    Args:
        machine: the processor, as :func:`platform.machine` calls it.
        own_pid: of the process that will install it.
        own_signals_only: only this process and its own process group may be sent signals. Where there is a namespace of
            processes, nobody else can be named anyway.
        keep_attributes: owners, modes, times and extended attributes of files stay as they are, whoever owns them.
    """
    column = list(_ARCHITECTURES).index(machine)
    lines: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),  # a call in the convention of another architecture has other numbers
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, _X32), _refuse(errno.ENOSYS)]
    answers = dict.fromkeys(DENIED.values(), errno.EPERM)
    if keep_attributes:
        answers |= dict.fromkeys(_ATTRIBUTES.values(), errno.EPERM) | dict.fromkeys(_MODES_AND_TIMES.values(), 0)
    for numbers, answer in answers.items():
        number = numbers[column]
        if number is not None:
            lines += [(_EQUAL, 0, 1, number), _refuse(answer)]
    lines += [(_EQUAL, 0, 1, _SOCKET[column]), _refuse(errno.EACCES)]
    # socketpair(2) stays: a pair of streams reaches nobody else, and asyncio wakes itself up through one. A socket of a
    # pair for datagrams could still send to any other in the file system.
    pair = [_argument(0), *_refused_unless(_AF_UNIX), _argument(1), *_refused_unless(*_STREAMS)]
    lines += _guarded(_SOCKETPAIR[column], pair)
    lines += _guarded(_FCNTL[column], [_argument(1), *_refused_if(_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETPIPE_SZ)])
    lines += _guarded(_SETSOCKOPT[column], [_argument(2), *_refused_if(_SO_SNDBUF, _SO_SNDBUFFORCE)])
    # The flags of clone3 lie in memory, where a filter cannot look; libraries fall back to clone.
    lines += [(_EQUAL, 0, 1, _CLONE3[column]), _refuse(errno.ENOSYS)]
    lines += _guarded(_CLONE[column], [_argument(0), (_ANY_BIT, 0, 1, _NAMESPACES), _refuse(errno.EPERM)])
    requests = _refused_if(_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP)
    lines += _guarded(_IOCTL[column], [_argument(1), *requests])
    about_itself = dict(_ABOUT_ITSELF) | (_SIGNALS if own_signals_only else {})
    for both in about_itself.values():
        lines += _guarded(both[column], [_argument(0), *_refused_unless(0, own_pid)])
    return [*lines, (_RETURN, 0, 0, _ALLOW)]


def install(*, own_signals_only: bool, keep_attributes: bool) -> None:
    """Put this process, and all that it will start, behind the filter.

    Raises:
        OSError: if the kernel does not do it.
    """
    lines = program(platform.machine(), os.getpid(), own_signals_only=own_signals_only, keep_attributes=keep_attributes)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    head = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))  # struct sock_fprog
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.prctl(libc.PR_SET_SECCOMP, _FILTER_MODE, head)


def _refuse(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERROR | number)


def _argument(index: int) -> Instruction:
    """Load the lower half of an argument; both processors keep it first."""
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)


def _refused_if(*values: int) -> list[Instruction]:
    """Refuse the call if what was loaded is one of these."""
    tests = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values[:-1], 1)]
    return [*tests, (_EQUAL, 0, 1, values[-1]), _refuse(errno.EPERM)]


def _refused_unless(*values: int) -> list[Instruction]:
    """Refuse the call if what was loaded is none of these."""
    tests = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [*tests, _refuse(errno.EPERM)]


def _guarded(number: int, body: list[Instruction]) -> list[Instruction]:
    """Instructions for one system call alone; if none of them returns, it is allowed."""
    body = [*body, (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]
