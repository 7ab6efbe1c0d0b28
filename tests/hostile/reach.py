"""Programs that reach for the network, for files, and for other processes."""

from __future__ import annotations

from tests.hostile.program import Hostile

NETWORK = (
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
)

WRITING = (
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
)

READING = (
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
)

OTHER_PROCESSES = (
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
)
