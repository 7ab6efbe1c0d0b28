"""Programs that try to leave their own confinement, or to have passed a test without an answer."""

from __future__ import annotations

from tests.hostile.program import Hostile, timed

FORGES = ("assert answer() == 42",)

CONFINEMENT = (
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
)

VERDICT = (
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
