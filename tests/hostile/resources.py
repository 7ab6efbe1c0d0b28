"""Programs that start others, or take memory, time, output and disk without end."""

from __future__ import annotations

from tests.hostile.program import Hostile, timed

PROCESSES = (
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
)

MEMORY = (
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
)

TIME = (
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
)

OUTPUT_AND_DISK = (
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
)
