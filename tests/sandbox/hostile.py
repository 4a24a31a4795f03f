"""Programs that mean harm. Each prints HARM if it got what it wanted, and is bounded by itself, too.

``FILE`` is a file of the host that everybody may read, ``FOLDER`` one that everybody may write to, ``PORT`` and
``SOCKET`` are listened on by the host, ``DATAGRAMS`` is a socket of the host for datagrams, ``SHARED`` the number of
shared memory that everybody may use, ``HOST`` the number of the host's process. ``gaps`` names the levels that do not
stop a program, and why.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from rehearsal.sandbox import Isolation, Outcome

RLIMITS, FILTERS = Isolation.RLIMITS, Isolation.FILTERS
ANY: tuple[Outcome, ...] = ()
RAN = (Outcome.FINISHED, Outcome.RAISED, Outcome.OUTPUT)
ENDED = (Outcome.KILLED, Outcome.EXITED, Outcome.BROKEN, Outcome.TIMEOUT, Outcome.MEMORY, Outcome.PROCESSES)


@dataclass(frozen=True)
class Hostile:
    """A program.

    Attributes:
        name: of the test.
        source: run in an interpreter.
        outcomes: how it may end; in any way if empty.
        seconds: its time limit.
        gaps: levels at which it succeeds, each with the reason.
        same_user: it also succeeds at the weakest level if programs run as the user that the host runs as; started by
            root, they run as nobody.
    """

    name: str
    source: str
    outcomes: tuple[Outcome, ...] = ANY
    seconds: float = 5.0
    gaps: dict[Isolation, str] = field(default_factory=dict)
    same_user: bool = False

    def succeeds(self, level: Isolation) -> bool:
        """Whether a level is known not to stop it."""
        return level in self.gaps or (self.same_user and level is RLIMITS and os.geteuid() != 0)


_LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def harmful(what, result):
    if result >= 0: print("HARM", what)
"""
_FILES = {RLIMITS: "it reads and writes what its user may"}
_DISK = "a limit on single files alone"

PROGRAMS = [
    # too much of everything
    Hostile("fork_bomb", """
import os, time
n = 0
for _ in range(200):
    try: pid = os.fork()
    except OSError: break
    if pid == 0:
        time.sleep(20); os._exit(0)
    n += 1
time.sleep(0.5)
if n > 50: print("HARM", n)
""", (*RAN, Outcome.PROCESSES)),
    Hostile("fork_tree", """
import os, time
root = os.getpid()
made = os.pipe()
for _ in range(7):  # at most 128
    try: pid = os.fork()
    except OSError: continue
    if pid: os.write(made[1], b"x")
if os.getpid() != root:
    time.sleep(20); os._exit(0)
time.sleep(0.5)
if len(os.read(made[0], 1000)) > 50: print("HARM")
""", (*RAN, Outcome.PROCESSES)),
    Hostile("thread_bomb", """
import threading, time
n = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); n += 1
except (RuntimeError, MemoryError): pass
if n > 50: print("HARM", n)
""", (*RAN, Outcome.PROCESSES)),
    Hostile("memory_bomb", """
kept = []
for _ in range(1500): kept.append(bytearray(1 << 20))
print("HARM")
""", (Outcome.MEMORY,), 30.0),
    Hostile("memory_of_many_processes", """
import os, time
for _ in range(5):
    if os.fork() == 0:
        kept = bytearray(b"x" * (50 << 20)) ; time.sleep(10); os._exit(0)
time.sleep(3)
print("HARM")
""", (Outcome.MEMORY,), 30.0),
    Hostile("shared_memory_of_many_processes", """
import mmap, os, time
for _ in range(5):
    if os.fork() == 0:
        kept = mmap.mmap(-1, 60 << 20)
        for i in range(0, len(kept), 4096): kept[i] = 1
        time.sleep(10); os._exit(0)
time.sleep(3)
print("HARM")
""", (Outcome.MEMORY,), 30.0),
    Hostile("memory_in_nameless_files", """
import os
fds = []
for _ in range(20):
    fd = os.memfd_create("x"); fds.append(fd); os.write(fd, bytes(1 << 20))
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("memory_of_system_five", _LIBC + "harmful('shmget', libc.shmget(0, 1 << 20, 0o1600))", RAN),
    Hostile("endless_output", "while True: print('x' * 1000)", (Outcome.TIMEOUT,), 1.0),
    Hostile("endless_error_output", "import os\nwhile True: os.write(2, b'x' * 65536)", (Outcome.TIMEOUT,), 1.0),
    Hostile("a_flood_of_output_at_once", "import sys\nsys.stdout.write('x' * (20 << 20))", (Outcome.OUTPUT,)),
    Hostile("a_huge_representation", "class A:\n    def __repr__(self): return 'x' * (20 << 20)\nA()",
            (Outcome.OUTPUT,)),
    Hostile("a_huge_error", "raise ValueError('x' * (20 << 20))", (Outcome.RAISED,)),
    Hostile("a_huge_integer", "9 ** 9 ** 9", (Outcome.TIMEOUT, Outcome.MEMORY), 1.0),
    Hostile("a_huge_integer_as_text", "import sys\nsys.set_int_max_str_digits(0)\nstr(1 << (1 << 27))", ENDED, 1.0),
    Hostile("a_zip_bomb", """
import zlib
packer = zlib.compressobj()
packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
zlib.decompress(packed)
print("HARM")
""", (Outcome.MEMORY,), 30.0),
    Hostile("deep_recursion", "def f(): f()\nf()", (Outcome.RAISED,)),
    Hostile("deeper_recursion", """
import sys
sys.setrecursionlimit(10 ** 8)
class A:
    def __getattr__(self, name): return getattr(self, name + "x")
A().x
""", (*ENDED, Outcome.RAISED)),
    Hostile("deeply_nested_source", "exec('(' * 100_000)", (Outcome.RAISED, Outcome.MEMORY, Outcome.KILLED)),
    Hostile("a_regular_expression_that_never_ends", "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
            (Outcome.TIMEOUT,), 1.0),
    Hostile("a_huge_file", """
with open("big", "wb") as file:
    for _ in range(8): file.write(bytes(1 << 20)); file.flush()
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("filling_the_disk", """
import os
written = 0
for number in range(20):
    with open(f"part{number}", "wb") as file:
        written += file.write(bytes(1 << 20))
print("HARM")
""", gaps={RLIMITS: _DISK, FILTERS: _DISK}),
    Hostile("many_small_files", """
import os
for number in range(11_000): os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))
print("HARM")
""", gaps={RLIMITS: _DISK, FILTERS: _DISK}),
    Hostile("many_open_files", """
kept = []
for _ in range(500): kept.append(open("/dev/null"))
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("filling_shared_memory_files", """
with open("/dev/shm/rehearsal-hostile", "wb") as file: file.write(bytes(1 << 10))
import os
os.remove("/dev/shm/rehearsal-hostile")
print("HARM")
""", gaps=_FILES),
    # files of the host
    Hostile("reading_a_file_of_the_host", "print('HARM' + open(FILE).read())", (Outcome.RAISED,), gaps=_FILES),
    Hostile("writing_to_a_folder_of_the_host", "open(FOLDER + '/left', 'w').write('x')\nprint('HARM')", gaps=_FILES),
    Hostile("a_symbolic_link_out", """
import os
os.symlink(FILE, "link")
print("HARM" + open("link").read())
""", (Outcome.RAISED,), gaps=_FILES),
    Hostile("a_hard_link_out", """
import os
os.link(FILE, "hard")
print("HARM" + open("hard").read())
""", (Outcome.RAISED,), same_user=True),
    Hostile("climbing_out_by_dots", "print('HARM' + open('../' * 20 + FILE).read())", (Outcome.RAISED,), gaps=_FILES),
    Hostile("listing_a_folder_of_the_host", "import os\nprint('HARM', os.listdir(FOLDER))", (Outcome.RAISED,),
            gaps=_FILES),
    Hostile("changing_what_is_known_of_a_file", """
import os
before = os.stat(FILE) if os.path.exists(FILE) else None
for change in (lambda: os.chmod(FILE, 0o600), lambda: os.utime(FILE, (0, 0)), lambda: os.setxattr(FILE, "user.a", b"b"),
               lambda: os.truncate(FILE, 14)):
    try: change()
    except OSError: pass
if before:
    after = os.stat(FILE)
    if (before.st_mode, before.st_mtime, before.st_ctime) != (after.st_mode, after.st_mtime, after.st_ctime):
        print("HARM")
        os.chmod(FILE, 0o644)
""", RAN, same_user=True),
    Hostile("changing_the_library", """
import os, json
with open(json.__file__, "a") as file: pass
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("changing_the_sandbox", """
import rehearsal.sandbox.inside.guest as guest
with open(guest.__file__, "a") as file: pass
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("mounting", _LIBC + """
import os
os.mkdir("m")
harmful("mount", libc.mount(b"none", b"m", b"tmpfs", 0, None))
harmful("umount", libc.umount2(b"/proc", 2))
harmful("chroot", libc.chroot(b"."))
""", RAN),
    Hostile("devices", """
import os, stat
os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0))
open("disk", "rb").read(1)
print("HARM")
""", (Outcome.RAISED,)),
    # the network
    Hostile("connecting_to_the_host", """
import socket
socket.create_connection(("127.0.0.1", PORT), 1).send(b"HARM")
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("sending_a_datagram", """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"HARM", ("127.0.0.1", PORT))
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("asking_for_a_name", "import socket\nsocket.getaddrinfo('example.org', 80)\nprint('HARM')",
            (Outcome.RAISED,)),
    Hostile("a_socket_in_the_file_system", """
import socket
socket.socket(socket.AF_UNIX).connect(SOCKET)
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("a_datagram_from_a_pair_of_sockets", """
import socket
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.sendto(b"HARM", DATAGRAMS)
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("sockets_of_the_kernel", _LIBC + """
for family, kind in ((16, 3), (17, 3), (38, 5), (40, 1)): harmful(family, libc.socket(family, kind, 0))
""", RAN),
    Hostile("rings_of_the_kernel", _LIBC + "harmful('io_uring', libc.syscall(425, 8, bytes(120)))", RAN),
    # other processes
    Hostile("killing_the_supervisor", """
import os, signal
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
    try: os.kill(os.getppid(), number)
    except OSError: pass
""", RAN),
    Hostile("killing_everybody", "import os\nos.kill(-1, 9)", (Outcome.KILLED, Outcome.EXITED, *RAN)),
    Hostile("signals_to_the_host", "import os\nos.kill(HOST, 0)\nprint('HARM')", (Outcome.RAISED,)),
    Hostile("signals_to_the_host_by_a_descriptor", """
import os, signal
signal.pidfd_send_signal(os.pidfd_open(HOST), 0)
print("HARM")
""", (Outcome.RAISED,)),
    Hostile("signals_to_the_owner_of_a_descriptor", """
import fcntl, os
read, write = os.pipe()
for change in ((fcntl.F_SETOWN, os.getppid()), (fcntl.F_SETSIG, 9)):
    try: fcntl.fcntl(read, *change)
    except OSError: continue
    print("HARM")
""", RAN),
    Hostile("shared_memory_of_the_host", _LIBC + """
libc.shmat.restype = ctypes.c_ssize_t
harmful("attached", libc.shmat(SHARED, None, 0))
harmful("looked at", libc.shmctl(SHARED, 2, bytes(200)))
""", RAN),
    Hostile("limits_of_others", """
import os, resource
for pid in (HOST, os.getppid()):
    try: resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, 100))
    except OSError: continue
    print("HARM")
""", RAN),
    Hostile("raising_its_own_limits", """
import resource
for name in ("AS", "FSIZE", "NOFILE", "NPROC", "CORE"):
    which = getattr(resource, "RLIMIT_" + name)
    try: resource.setrlimit(which, (resource.RLIM_INFINITY,) * 2)
    except (OSError, ValueError): continue
    print("HARM", name)
""", RAN),
    Hostile("tracing_the_supervisor", _LIBC + "import os\nharmful('ptrace', libc.ptrace(16, os.getppid(), 0, 0))", RAN),
    Hostile("memory_of_the_supervisor", _LIBC + """
import os
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = ctypes.create_string_buffer(8)
mine, its = Vector(ctypes.addressof(here), 8), Vector(id(None), 8)
harmful("read", libc.process_vm_readv(os.getppid(), ctypes.byref(mine), 1, ctypes.byref(its), 1, 0))
for pid in (1, os.getppid(), HOST):
    try: open(f"/proc/{pid}/mem", "rb")
    except OSError: continue
    print("HARM", pid)
""", RAN, same_user=True),
    Hostile("environment_of_other_processes", """
import os
for pid in (1, os.getppid(), HOST, "self"):
    try: text = open(f"/proc/{pid}/environ").read()
    except OSError: continue
    if "SECRET" in text: print("HARM", pid)
""", RAN),
    Hostile("looking_at_processes", "print('HARM' + open(f'/proc/{HOST}/stat').read())", (Outcome.RAISED,),
            gaps=_FILES),
    Hostile("its_own_environment", """
import ctypes, os
if any("SECRET" in key + value for key, value in os.environ.items()): print("HARM")
table = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
for entry in iter(lambda i=iter(range(1000)): table[next(i)], None):
    if b"SECRET" in entry: print("HARM")
""", RAN),
    Hostile("descriptors_that_were_left_open", """
import os
for fd in range(5, 2000):
    try: os.fstat(fd)
    except OSError: continue
    print("HARM", fd)
""", RAN),
    Hostile("becoming_somebody_else", _LIBC + """
import os
for change in (os.setuid, os.setgid):  # where root cannot be anybody else, it has no capabilities left
    try:
        if os.getuid(): change(0); print("HARM")
    except OSError: pass
harmful("unshare", libc.unshare(0x10000000))
harmful("clone", libc.syscall(56, 0x10000011, 0, 0, 0, 0)) if os.uname().machine == "x86_64" else None
if libc.prctl(39, 0, 0, 0, 0) != 1: print("HARM: privileges can be had")
""", RAN),
    Hostile("programs_that_give_privileges", """
import subprocess
for command in (["/usr/bin/su", "-c", "id"], ["/bin/mount", "-t", "tmpfs", "none", "/"], ["/usr/bin/newgrp"]):
    try: done = subprocess.run(command, capture_output=True, timeout=3)
    except (OSError, subprocess.TimeoutExpired): continue
    if done.returncode == 0: print("HARM", command, done.stdout)
"""),
    Hostile("the_clock_and_the_machine", _LIBC + """
import time
try:
    time.clock_settime(time.CLOCK_REALTIME, 0)
    print("HARM")
except OSError: pass
harmful("name", libc.sethostname(b"x", 1))
harmful("log", libc.klogctl(3, bytes(100), 100))
harmful("bpf", libc.syscall(321, 0, bytes(100), 100))
""", RAN),
    # its own process and its pipes
    Hostile("leaving_at_once", "import os\nos._exit(0)", (Outcome.EXITED,)),
    Hostile("leaving", "import sys\nsys.exit(0)", (Outcome.RAISED,)),
    Hostile("killing_itself", "import os\nos.kill(os.getpid(), 9)", (Outcome.KILLED,)),
    Hostile("stopping_itself", "import os\nos.kill(os.getpid(), 19)", (Outcome.TIMEOUT,), 1.0),
    Hostile("a_crash_in_native_code", "import ctypes\nctypes.string_at(0)", (Outcome.KILLED,)),
    Hostile("becoming_another_program", "import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 20'])", ENDED, 1.0),
    Hostile("catching_everything", """
import signal
for number in range(1, 65):
    try: signal.signal(number, lambda *_: None)
    except (OSError, ValueError): pass
while True:
    try:
        while True: pass
    except BaseException: pass
""", (Outcome.TIMEOUT,), 1.0),
    Hostile("an_error_that_never_ends", """
class Evil(Exception):
    def __str__(self):
        while True: pass
raise Evil
""", (Outcome.TIMEOUT,), 1.0),
    Hostile("closing_all_descriptors", "import os\nos.closerange(0, 100)", ENDED),
    Hostile("rubbish_for_its_warden", "import os\nos.write(4, b'\\xff' * 100_000)", (Outcome.BROKEN,)),
    Hostile("a_length_that_never_comes", "import os\nos.write(4, b'\\0\\0\\xff\\xff')\nwhile True: pass",
            (Outcome.TIMEOUT, Outcome.BROKEN), 1.0),
    Hostile("a_deeply_nested_message", """
import os
body = b"[" * 200_000
os.write(4, len(body).to_bytes(4, "big")); os.write(4, body)
while True: pass
""", (Outcome.BROKEN,)),
    Hostile("endless_questions", "import host\nwhile True:\n    try: host.ask('x')\n    except RuntimeError: pass",
            (Outcome.TIMEOUT,), 1.0),
    Hostile("a_huge_question", "import host\nhost.ask('x' * (20 << 20))", (Outcome.BROKEN, Outcome.MEMORY)),
    Hostile("a_call_that_says_it_is_done", """
import json, os
for n in range(1, 50):
    body = json.dumps({"n": n, "error": None}).encode()
    os.write(4, len(body).to_bytes(4, "big") + body)
while True: pass
""", (Outcome.BROKEN, Outcome.FINISHED), 1.0),
    Hostile("output_that_cannot_be_flushed", """
import sys
class Evil:
    def flush(self): raise SystemExit
    def write(self, text): raise KeyboardInterrupt
sys.stdout = sys.stderr = Evil()
print("x")
""", (Outcome.RAISED,)),
    # what stays behind
    Hostile("a_daemon_that_outlives", """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(60)
    os._exit(0)
""", RAN),
    Hostile("a_daemon_that_talks_on", """
import os, time
if os.fork() == 0:
    os.setsid()
    while True: os.write(1, b"x" * 1000)
""", (*RAN, Outcome.PROCESSES)),
    Hostile("patched_built_ins", """
import builtins, json, sys
builtins.len = lambda x: 42
builtins.print = lambda *a: None
json.dumps = lambda *a, **k: "{}"
sys.modules["math"] = None
""", (*RAN, *ENDED), 1.0),
    Hostile("hooks_left_for_the_next", """
import atexit, os, sys
class Hook:
    def find_spec(self, name, path, target=None): print("HARM"); return None
sys.meta_path.insert(0, Hook())
for name in ("sitecustomize.py", "json.py", "math.py", "evil.pth", "random.py"):
    open(name, "w").write("print('HARM')")
os.environ["PYTHONSTARTUP"] = os.path.abspath("json.py")
open(os.path.expanduser("~/.bashrc"), "w").write("echo HARM")
sys.settrace(lambda *a: None)
""", RAN),
]  # fmt: skip
