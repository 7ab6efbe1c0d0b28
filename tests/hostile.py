"""Hostile programs, and what each would have changed outside of its sandbox.

A program tries its attack, and all that follows is seen from outside: files, sockets, signals, other processes, time
and memory. `Outside` sets the scene up and names the damage; without any, the program was contained.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from opd.sandbox import Limits, Ran, Sandbox

LIMITS = Limits(cpu_seconds=5, memory=256, output=1 << 16, files=2, entries=64, threads=24)
SHORT, LONG = 0.25, 1.5
"""Seconds for a program that nothing but time ends, and for the others."""
SLACK = 4.0
"""Seconds behind its limit after which a program must be gone, on a busy machine and with the start of Python."""
GROWN = 64 << 20
"""Bytes by which our own memory may grow meanwhile."""


@dataclass(frozen=True)
class Hostile:
    """One program.

    Attributes:
        name: what it tries, as the docs say it.
        text: the program; names of `Outside.names` are defined before it, and `attempt(f, ...)` swallows what `f`
            raises.
        ends: reasons of which one must end it, where that is what contains it.
        tests: that it must not pass.
        control: a piece of the damage that it does when nothing confines it, where that harms nobody.
    """

    name: str
    text: str
    ends: frozenset[str] = frozenset()
    tests: tuple[str, ...] = ()
    control: str = ""

    @property
    def limits(self) -> Limits:
        return replace(LIMITS, seconds=SHORT if self.ends and self.ends <= timed() else LONG)


def timed(*also: str) -> frozenset[str]:
    return frozenset(("time", "cpu", *also))


PRELUDE = """
import ctypes, os, sys, time
def attempt(f, *a, **k):
    try:
        return f(*a, **k)
    except BaseException as error:
        return None
libc = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
def call(x86, arm, *a):
    return libc.syscall(ctypes.c_long(arm if ARM else x86), *(ctypes.c_long(x) if isinstance(x, int) else x for x in a))
def mark(name="mark"):
    with open(FOLDER + "/" + name, "w") as file:
        file.write("here")
"""

FORGES = ("assert answer() == 42",)

HOSTILE = (
    # Processes.
    Hostile(
        "fork bomb",
        """
while True:
    os.fork()
""",
    ),
    Hostile(
        "fork by its number",
        """
if call(57, 220, 17, 0, 0, 0, 0) == 0:
    mark()
    os._exit(0)
time.sleep(0.2)
""",
    ),
    Hostile(
        "vfork by its number",
        """
if not ARM:
    print(call(58, 0) > 0)
""",
    ),
    Hostile(
        "clone3 by its number",
        """
a = ctypes.create_string_buffer(88)
a[32] = 17
if call(435, 435, a, 88) == 0:
    mark()
    os._exit(0)
time.sleep(0.2)
""",
    ),
    Hostile(
        "a process through `subprocess`",
        """
import subprocess
subprocess.run(['/bin/sh', '-c', f'echo > {FOLDER}/mark'])
""",
        control="new file",
    ),
    Hostile(
        "a shell through `os.system`",
        """
os.system(f'echo > {FOLDER}/mark')
""",
        control="new file",
    ),
    Hostile(
        "`posix_spawn`",
        """
os.posix_spawn('/bin/sh', ['sh', '-c', f'echo > {FOLDER}/mark'], {})
time.sleep(0.2)
""",
    ),
    Hostile(
        "`multiprocessing`",
        """
import multiprocessing as m
m.set_start_method('fork')
p = m.Process(target=mark)
p.start()
p.join()
""",
    ),
    Hostile(
        "a shell in its own place (`exec`)",
        """
os.execv('/bin/sh', ['sh', '-c', f'echo > {FOLDER}/mark'])
""",
        control="new file",
    ),
    Hostile(
        "a daemon (fork, setsid, fork)",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(3)
    os._exit(0)
""",
        control="process left",
    ),
    Hostile(
        "a session of its own",
        """
attempt(os.setsid)
attempt(os.setpgid, 0, 0)
time.sleep(60)
""",
        timed(),
    ),
    # Memory.
    Hostile(
        "memory: one large object",
        """
x = bytearray(8 << 30)
""",
        frozenset(("memory",)),
    ),
    Hostile(
        "memory: a growing list",
        """
x = []
while True:
    x.append(bytes(1 << 20))
""",
        frozenset(("memory",)),
    ),
    Hostile(
        "memory: recursion",
        """
sys.setrecursionlimit(10**9)
def f(x):
    return f(bytearray(1 << 16))
f(1)
""",
        timed("error", "killed", "memory"),
    ),
    Hostile(
        "memory: shared mappings",
        """
import mmap
x = []
while True:
    m = mmap.mmap(-1, 1 << 24)
    m.write(bytes(1 << 24))
    x.append(m)
""",
    ),
    Hostile(
        "memory: files in memory",
        """
for _ in range(50):
    f = call(319, 279, b'x', 0)
    for _ in range(64):
        os.write(f, bytes(1 << 20))
""",
    ),
    Hostile(
        "memory: System V segments",
        """
for i in range(50):
    print(call(29, 194, 0, 1 << 26, 0o1600))
""",
    ),
    # Time.
    Hostile(
        "an endless loop",
        """
while True:
    pass
""",
        timed(),
    ),
    Hostile(
        "sleep",
        """
time.sleep(3600)
""",
        timed(),
    ),
    Hostile(
        "an endless call within C",
        """
sum(range(10 ** 15))
""",
        timed(),
    ),
    Hostile(
        "ignored SIGTERM and SIGXCPU",
        """
import signal
for s in range(1, 64):
    attempt(signal.signal, s, signal.SIG_IGN)
while True:
    attempt(time.sleep, 1)
""",
        timed(),
    ),
    Hostile(
        "blocked signals",
        """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    pass
""",
        timed(),
    ),
    Hostile(
        "a function at exit that never ends",
        """
import atexit
atexit.register(lambda: time.sleep(3600))
""",
        timed(),
    ),
    Hostile(
        "SIGSTOP to itself",
        """
import signal
os.kill(os.getpid(), signal.SIGSTOP)
""",
        timed(),
    ),
    Hostile(
        "a storm of alarms",
        """
import signal
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)
while True:
    attempt(time.sleep, 1)
""",
        timed(),
    ),
    Hostile(
        "a bomb of threads",
        """
import threading
threading.stack_size(32768)
while True:
    threading.Thread(target=time.sleep, args=(60,)).start()
""",
        timed("error", "killed", "memory", "threads"),
    ),
    Hostile(
        "threads that outlive the main one",
        """
import threading
def f():
    while True:
        time.sleep(0.01)
for _ in range(3):
    threading.Thread(target=f).start()
""",
        timed(),
    ),
    # Network.
    Hostile(
        "TCP",
        """
import socket
s = socket.create_connection(('127.0.0.1', PORT), 1)
s.send(b'x')
""",
        control="TCP",
    ),
    Hostile(
        "TCP by numbers",
        """
a = (2).to_bytes(2, 'little') + PORT.to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)
s = call(41, 198, 2, 1, 0)
call(42, 203, s, a, 16)
""",
        control="TCP",
    ),
    Hostile(
        "UDP",
        """
import socket
socket.socket(2, 2).sendto(b'x', ('127.0.0.1', UDP))
""",
        control="UDP",
    ),
    Hostile(
        "a Unix socket",
        """
import socket
s = socket.socket(1, 1)
s.connect(UNIX)
""",
        control="Unix",
    ),
    Hostile(
        "an abstract socket",
        r"""
import socket
s = socket.socket(1, 1)
s.connect('\0' + ABSTRACT)
""",
        control="abstract",
    ),
    Hostile(
        "a pair of sockets that sends elsewhere",
        r"""
import socket
a, b = socket.socketpair(1, 2)
a.sendto(b'x', '\0' + ABSTRACT)
""",
    ),
    Hostile(
        "looking up a name",
        """
import socket
print(attempt(socket.getaddrinfo, 'localhost', 80) is not None)
""",
    ),
    Hostile(
        "a raw socket",
        """
print(call(41, 198, 2, 3, 1) >= 0, call(41, 198, 17, 3, 768) >= 0, call(41, 198, 16, 3, 0) >= 0)
""",
    ),
    Hostile(
        "a port of its own",
        """
import socket
s = socket.socket()
s.bind(('0.0.0.0', 0))
s.listen()
print('listens')
""",
    ),
    # Writing.
    Hostile(
        "writing to the caller's folder",
        """
mark()
""",
        control="new file",
    ),
    Hostile(
        "writing to /tmp, /var/tmp, /dev/shm, home and /etc",
        """
for f in ('/tmp', '/var/tmp', '/dev/shm', '/root', '/etc', TEMP):
    attempt(lambda: open(f'{f}/{MARK}', 'w').write('x'))
""",
    ),
    Hostile(
        "overwriting a file",
        """
open(WITNESS, 'w').write('gone')
""",
        control="witness",
    ),
    Hostile(
        "emptying a file",
        """
attempt(os.truncate, WITNESS, 0)
attempt(os.open, WITNESS, os.O_WRONLY | os.O_TRUNC)
""",
        control="witness",
    ),
    Hostile(
        "deleting a file",
        """
os.unlink(WITNESS)
""",
        control="witness",
    ),
    Hostile(
        "renaming a file",
        """
os.rename(WITNESS, WITNESS + '2')
""",
        control="witness",
    ),
    Hostile(
        "moving a file in",
        """
open('x', 'w').write('x')
os.rename('x', FOLDER + '/x')
""",
        control="new file",
    ),
    Hostile(
        "modes, owners and times of a file",
        """
attempt(os.chmod, WITNESS, 0o777)
attempt(os.chown, WITNESS, 1, 1)
attempt(os.utime, WITNESS, (1, 1))
attempt(os.setxattr, WITNESS, 'user.x', b'x')
""",
        control="witness",
    ),
    Hostile(
        "a symbolic link out",
        """
os.symlink(FOLDER, 'link')
open('link/mark', 'w').write('x')
""",
        control="new file",
    ),
    Hostile(
        "a hard link to a file",
        """
os.link(WITNESS, 'link')
open('link', 'w').write('gone')
""",
    ),
    Hostile(
        "/proc/self/root and cwd",
        """
for r in ('/proc/self/root', '/proc/1/root', f'/proc/{NEIGHBOUR}/root', '/proc/self/cwd/../../../../../..'):
    attempt(lambda: open(r + WITNESS, 'w').write('gone'))
""",
        control="witness",
    ),
    Hostile(
        "descriptors of other processes",
        """
for p in ('self', PARENT, NEIGHBOUR, os.getppid()):
    for n in range(64):
        file = attempt(os.open, f'/proc/{p}/fd/{n}', os.O_RDONLY | os.O_NONBLOCK) if p != 'self' else None
        print(file is not None and attempt(os.read, file, 9999))
""",
    ),
    Hostile(
        "folders that were opened before",
        """
for n in range(3, 256):
    for name in ('mark', '../mark'):
        attempt(lambda: os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=n))
    attempt(os.fchdir, n)
""",
    ),
    Hostile(
        "mounting over",
        """
print(call(165, 40, b'none', FOLDER.encode(), b'tmpfs', 0, 0) == 0, call(272, 97, 0x10000000) == 0)
print(call(161, 51, b'.') == 0, call(155, 41, b'.', b'.') == 0)
""",
    ),
    Hostile(
        "devices",
        """
for d in ('/dev/mem', '/dev/kmem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/tty', '/dev/fuse', '/dev/kvm'):
    print(attempt(open, d, 'r+b') is not None)
print(attempt(os.mknod, 'd', 0o20666, os.makedev(1, 1)) is not None or False)
""",
    ),
    # Reading.
    Hostile(
        "reading a secret of the caller",
        """
print(open(SECRET).read())
""",
        control="secret",
    ),
    Hostile(
        "listing the caller's folder",
        """
print(os.listdir(FOLDER))
""",
        control="listed",
    ),
    Hostile(
        "the environment of another process",
        """
print(open(f'/proc/{NEIGHBOUR}/environ').read())
""",
        control="secret",
    ),
    Hostile(
        "the command line of another process",
        """
print(open(f'/proc/{NEIGHBOUR}/cmdline').read())
""",
        control="secret",
    ),
    Hostile(
        "listing processes",
        """
print(sum(n.isdigit() for n in os.listdir('/proc')) > 2)
""",
        control="True",
    ),
    Hostile(
        "memory of another process",
        """
for p in (NEIGHBOUR, PARENT):
    attempt(lambda: print('open', open(f'/proc/{p}/mem', 'r+b')))
    attempt(lambda: print('maps', len(open(f'/proc/{p}/maps').read())))
""",
    ),
    Hostile(
        "variables of its own environment",
        """
print(sorted(os.environ))
""",
    ),
    # Other processes.
    Hostile(
        "ptrace",
        """
print(call(101, 117, 16, NEIGHBOUR, 0, 0) == 0, call(101, 117, 0x4206, NEIGHBOUR, 0, 0) == 0)
print(call(101, 117, 0, 0, 0, 0) == 0)
""",
    ),
    Hostile(
        "process_vm_readv",
        """
b = ctypes.create_string_buffer(8)
v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)
e = attempt(call, 310, 270, NEIGHBOUR, v, 1, v, 1, 0)
print(e == 8, ctypes.get_errno() == 14)
""",
    ),
    Hostile(
        "killing another process",
        """
attempt(os.kill, NEIGHBOUR, 9)
attempt(os.kill, NEIGHBOUR, 19)
""",
        control="neighbour",
    ),
    Hostile(
        "killing another process's group",
        """
attempt(os.killpg, NEIGHBOUR, 9)
call(234, 131, NEIGHBOUR, NEIGHBOUR, 9)
""",
        control="neighbour",
    ),
    Hostile(
        "signals by numbers",
        """
call(62, 129, NEIGHBOUR, 9)
call(200, 130, NEIGHBOUR, 9)
b = ctypes.create_string_buffer(128)
call(129, 138, NEIGHBOUR, 10, b)
call(297, 240, NEIGHBOUR, NEIGHBOUR, 10, b)
""",
        control="neighbour",
    ),
    Hostile(
        "signals by a process's descriptor",
        """
f = call(434, 434, NEIGHBOUR, 0)
call(424, 424, f, 9, 0, 0)
""",
        control="neighbour",
    ),
    Hostile(
        "signals through a file's owner",
        """
import fcntl
r, w = attempt(os.pipe) or (0, 1)
fcntl.fcntl(r, fcntl.F_SETOWN, NEIGHBOUR)
fcntl.fcntl(r, 10, 9)
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
os.write(w, b'x')
""",
        control="neighbour",
    ),
    Hostile(
        "signals to its parent and its group",
        """
attempt(os.kill, os.getppid(), 23)
attempt(os.kill, PARENT, 23)
attempt(os.kill, -1, 23)
""",
        control="signal",
    ),
    Hostile(
        "priority and limits of another process",
        """
attempt(os.setpriority, 0, NEIGHBOUR, 19)
call(302, 261, NEIGHBOUR, 7, (ctypes.c_uint64 * 2)(3, 3), 0)
attempt(os.sched_setaffinity, NEIGHBOUR, [0])
""",
        control="neighbour",
    ),
    # Output and disk.
    Hostile(
        "endless output",
        """
while True:
    print('x' * 9999)
""",
        frozenset(("output",)),
    ),
    Hostile(
        "endless errors",
        """
while True:
    sys.stderr.write('x' * 9999)
""",
        frozenset(("output",)),
    ),
    Hostile(
        "endless output in a thread at exit",
        """
import threading
def f():
    while True:
        os.write(1, bytes(9999))
threading.Thread(target=f).start()
""",
        frozenset(("output",)),
    ),
    Hostile(
        "floods of all descriptors",
        """
for n in range(64):
    attempt(os.set_blocking, n, False)
while True:
    for n in range(64):
        attempt(os.write, n, bytes(65536))
""",
        timed("output"),
    ),
    Hostile(
        "a huge file",
        """
with open('f', 'wb') as f:
    while True:
        f.write(bytes(1 << 20))
""",
        timed("error", "files"),
    ),
    Hostile(
        "many files",
        """
i = 0
while True:
    i += 1
    open(str(i), 'w').close()
""",
        timed("error", "files"),
    ),
    Hostile(
        "folders within folders",
        """
while True:
    os.mkdir('d')
    os.chdir('d')
""",
        timed("error", "files"),
    ),
    Hostile(
        "a folder that hides its files",
        """
attempt(os.mkdir, 'd', 0o300)
i = 0
while True:
    i += 1
    open(f'd/{i}', 'wb').write(bytes(1 << 20))
""",
        timed("error", "files"),
    ),
    Hostile(
        "files that were deleted while open",
        """
k = []
for i in range(40):
    f = open(f'f{i}', 'wb')
    os.unlink(f'f{i}')
    f.write(bytes(1 << 20))
    f.flush()
    k.append(f)
print('hidden')
""",
    ),
    Hostile(
        "files without a name",
        """
k = []
for i in range(40):
    f = os.open('.', os.O_TMPFILE | os.O_RDWR)
    os.write(f, bytes(1 << 20))
    k.append(f)
print('hidden')
""",
    ),
    Hostile(
        "files elsewhere in what it sees",
        """
for d in ('/', '/dev', '/usr', '/usr/lib', '/etc', '/lib', '/proc', '/sys', '/run', '..', '/dev/shm'):
    if attempt(lambda: open(f'{d}/{MARK}', 'wb').write(bytes(1 << 20))):
        print('hidden')
""",
    ),
    # The kernel, and its own confinement.
    Hostile(
        "raising its own limits",
        """
import resource
for n in range(16):
    for v in (-1, 1 << 40):
        attempt(resource.setrlimit, n, (v, v))
x = []
while True:
    x.append(bytes(1 << 20))
""",
        frozenset(("memory",)),
    ),
    Hostile(
        "numbers of the x32 ABI",
        """
if not ARM:
    print(call(0x40000000 + 57, 0) >= 0)
""",
    ),
    Hostile(
        "calls of the 32-bit ABI",
        r"""
import mmap
if not ARM:
    m = mmap.mmap(-1, 4096, prot=7)
    m.write(b'\xb8\x02\0\0\0\xcd\x80\xc3')
    f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
    print(f() >= 0)
""",
    ),
    Hostile(
        "namespaces of its own",
        """
for flag in (0x10000000, 0x20000000, 0x40000000, 0x20000):
    print(call(272, 97, flag) == 0)
""",
    ),
    Hostile(
        "rare calls",
        """
b = ctypes.create_string_buffer(256)
x86 = (425, 321, 323, 298, 250, 304, 246, 175, 167, 169, 317, 157, 135, 440)
arm = (425, 280, 282, 241, 219, 265, 104, 105, 224, 142, 277, 167, 92, 440)
for x86, arm in zip(x86, arm):
    print(call(x86, arm, 1 if x86 == 135 else 0, b, b, b, 0) >= 0)
""",
    ),
    Hostile(
        "taking its filter away",
        """
print(libc.prctl(22, 0, 0, 0, 0) == 0, libc.prctl(38, 0, 0, 0, 0) == 0)
""",
    ),
    Hostile(
        "deleting its own folder",
        """
import shutil
shutil.rmtree('.', ignore_errors=True)
attempt(os.rmdir, os.getcwd())
attempt(os.rename, os.getcwd(), '/tmp/x')
""",
    ),
    Hostile(
        "names that its deletion may need",
        """
for i in range(20):
    os.makedirs(f'.up-{i}/x/y')
    open(f'.up-{i}/z', 'w').close()
""",
    ),
    Hostile(
        "closed folders and names of odd bytes",
        r"""
os.makedirs('a/b')
attempt(os.mkdir, b'a/\xff\n ', 0)
os.umask(0o777)
for name in ('a/c', 'a/b/d', '-rf', 'e'):
    attempt(os.mkdir, name)
attempt(open, b'\xfe', 'w')
""",
    ),
    Hostile(
        "folders from many threads until the end",
        """
import threading
def make(i):
    for n in range(1 << 30):
        attempt(os.mkdir, f'{i}-{n}')
        attempt(os.mkdir, f'{i}-{n - 1}/x')
for i in range(8):
    threading.Thread(target=make, args=(i,)).start()
""",
        timed("files"),
    ),
    # The verdict.
    Hostile(
        "ending with success (`sys.exit`)",
        """
sys.exit(0)
""",
        tests=FORGES,
    ),
    Hostile(
        "ending with success (`os._exit`)",
        """
os._exit(0)
""",
        tests=FORGES,
    ),
    Hostile(
        "ending within the function",
        """
def answer():
    os._exit(0)
""",
        tests=FORGES,
    ),
    Hostile(
        "raising SystemExit within the function",
        """
def answer():
    raise SystemExit(0)
""",
        tests=FORGES,
    ),
    Hostile(
        "printing that it passed",
        r"""
print('passed\n1.0\nok')
def answer():
    print('passed')
""",
        tests=FORGES,
    ),
    Hostile(
        "false verdicts into all descriptors",
        r"""
for n in range(64):
    attempt(os.set_blocking, n, False)
    for s in ('', '0' * 32):
        attempt(os.write, n, f'ready\n{s} 0\n0\n'.encode())
def answer():
    return 0
""",
        tests=FORGES,
    ),
    Hostile(
        "changed builtins",
        """
import builtins
class Never(Exception):
    pass
builtins.AssertionError = Never
builtins.all = builtins.isinstance = builtins.len = lambda *a: True
def answer():
    return []
""",
        tests=("assert len(answer()) == 5", "assert all([answer()])"),
    ),
    Hostile(
        "a trace function that skips lines",
        """
def trace(frame, event, arg):
    attempt(setattr, frame, 'f_lineno', frame.f_lineno + 1)
    return trace
sys.settrace(trace)
def answer():
    return 0
""",
        tests=FORGES,
    ),
    Hostile(
        "closed and exchanged descriptors",
        """
for n in range(3, 64):
    attempt(os.dup2, 1, n)
print('0' * 32 + ' 0')
def answer():
    return 0
""",
        tests=FORGES,
    ),
)

NEIGHBOUR = """
import signal, sys, time
signal.signal(signal.SIGURG, lambda *a: sys.exit(77))
print('up', flush=True)
time.sleep(600)
"""


class Outside:
    """What a program could harm: files in `folder`, listeners, and a process that has nothing to do with it."""

    def __init__(self, folder: Path):
        self.folder, self.secret, self.mark = folder, secrets.token_hex(8), f"mark-{secrets.token_hex(8)}"
        adopt_orphans()
        self.temp = folder / "temp"
        self.temp.mkdir()
        self.inner = folder / "caller"
        self.listeners = {
            "TCP": socket.create_server(("127.0.0.1", 0)),
            "UDP": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "Unix": socket.socket(socket.AF_UNIX),
            "abstract": socket.socket(socket.AF_UNIX),
        }
        self.abstract = secrets.token_hex(8)
        self.listeners["UDP"].bind(("127.0.0.1", 0))
        self.listeners["Unix"].bind(str(folder / "socket"))
        self.listeners["abstract"].bind("\0" + self.abstract)
        for name, listener in self.listeners.items():
            listener.setblocking(False)
            if name in ("Unix", "abstract"):
                listener.listen()
        self.signals = 0
        self.handled = signal.signal(signal.SIGURG, self._signalled)
        self.neighbour: subprocess.Popen[str] | None = None

    def _signalled(self, *_: object) -> None:
        self.signals += 1

    def close(self) -> None:
        signal.signal(signal.SIGURG, self.handled)
        for listener in self.listeners.values():
            listener.close()
        self._end_neighbour()

    def _end_neighbour(self) -> None:
        if self.neighbour is not None:
            self.neighbour.kill()
            self.neighbour.wait()
            assert self.neighbour.stdout is not None
            self.neighbour.stdout.close()

    def _prepare(self) -> None:
        if self.inner.exists():
            for path in self.inner.iterdir():
                path.unlink()
        self.inner.mkdir(exist_ok=True)
        (self.inner / "witness").write_text("unchanged")
        (self.inner / "witness").chmod(0o644)
        (self.inner / "secret").write_text(self.secret)
        if self.neighbour is None or self._neighbour() != self.before:
            self._end_neighbour()
            self.neighbour = subprocess.Popen(
                [sys.executable, "-c", NEIGHBOUR, self.secret],
                env={"SECRET": self.secret},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert self.neighbour.stdout is not None
            self.neighbour.stdout.readline()
            self.before = self._neighbour()

    def _neighbour(self) -> tuple[object, ...]:
        """That it lives, signals on their way to it, whether it is stopped, traced or reniced, and its limits."""
        assert self.neighbour is not None
        if self.neighbour.poll() is not None:
            return ("dead",)
        here = Path("/proc", str(self.neighbour.pid))
        stat = (here / "stat").read_text().rsplit(")", 1)[1].split()
        pending = [line for line in (here / "status").read_text().splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
        limits = (here / "limits").read_text()
        return stat[0] in "tT", pending, stat[15:17], limits, os.sched_getaffinity(self.neighbour.pid)

    def names(self) -> str:
        assert self.neighbour is not None
        values = {
            "FOLDER": str(self.inner),
            "WITNESS": str(self.inner / "witness"),
            "SECRET": str(self.inner / "secret"),
            "TEMP": str(self.folder),
            "MARK": self.mark,
            "PORT": self.listeners["TCP"].getsockname()[1],
            "UDP": self.listeners["UDP"].getsockname()[1],
            "UNIX": str(self.folder / "socket"),
            "ABSTRACT": self.abstract,
            "NEIGHBOUR": self.neighbour.pid,
            "PARENT": os.getpid(),
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def run(self, sandbox: Sandbox, hostile: Hostile) -> tuple[Ran, list[str]]:
        """What it did, and the damage. One at a time on this machine: what a control does to all processes, a program
        beside it would seem to have done."""
        with open(__file__, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._run(sandbox, hostile)

    def _run(self, sandbox: Sandbox, hostile: Hostile) -> tuple[Ran, list[str]]:
        self._prepare()
        self.signals = 0
        before, grown, state = processes(), memory(), self._state()
        began = time.monotonic()
        ran = sandbox.run(self.names() + PRELUDE + hostile.text, tests=hostile.tests, limits=hostile.limits)
        took = time.monotonic() - began
        found = []
        if took > hostile.limits.seconds + SLACK:
            found.append(f"took {took:.1f} s")
        if memory() - grown > GROWN:
            found.append("our memory grew")
        now = self._state()
        found += ["witness changed"] if now[0] != state[0] else []
        found += [f"new file {name}" for name in now[1] - state[1]]
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/root", "/etc", str(self.folder)):
            if os.path.exists(f"{folder}/{self.mark}"):
                os.unlink(f"{folder}/{self.mark}")
                found.append(f"new file in {folder}")
        found += [f"scratch left: {name}" for name in os.listdir(self.temp) if name.startswith("opd-sandbox-")]
        for name, listener in self.listeners.items():
            with contextlib.suppress(BlockingIOError):
                (listener.recv(9) if name == "UDP" else listener.accept()[0].close())
                found.append(f"{name} was reached")
        if self.signals:
            found.append("signal to us")
        if self._neighbour() != self.before:
            found.append("neighbour harmed")
        if self.secret in ran.stdout + ran.stderr:
            found.append("secret told")
        if "witness" in ran.stdout:
            found.append("folder listed")
        for word in ("True", "hidden", "listens", "open", "maps"):
            if word in ran.stdout.replace(str(self.inner), ""):
                found.append(f"said {word}")
        # What goes on is found by its going on: in `none` it is meant to.
        left = left_behind(before, 0.2 if sandbox.confinement.kind == "none" else 5.0)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        found += ["process left"] if left else []
        if ran.passed:
            found.append("a test passed")
        return ran, found

    def _state(self) -> tuple[object, set[str]]:
        names = set(os.listdir(self.inner))
        if "witness" not in names:
            return None, names
        path = self.inner / "witness"
        facts = path.stat()
        return (
            path.read_text(),
            facts.st_mode,
            facts.st_uid,
            facts.st_nlink,
            facts.st_mtime_ns,
            os.listxattr(path),
        ), names


def adopt_orphans() -> None:
    """Whatever this process started stays below it, also when what stood between has ended."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def processes() -> set[int]:
    """Numbers of the processes below this one; those that have ended are waited for or left out."""
    above: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = Path("/proc", name, "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state not in "ZX":
                    above.setdefault(int(parent), []).append(int(name))
    found, now = set[int](), [os.getpid()]
    while now:
        now = [child for parent in now for child in above.get(parent, ())]
        found |= set(now)
    return found


def left_behind(before: set[int], seconds: float = 5.0) -> set[int]:
    """Processes that were not there before, once those that are being ended are gone."""
    until = time.monotonic() + seconds
    while (left := processes() - before) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
