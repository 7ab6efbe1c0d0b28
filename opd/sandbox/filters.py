"""The system calls that a confined program may make, as a seccomp filter (classic BPF), for x86_64 and aarch64.

A list of what is allowed: all else fails with EPERM, and what later kernels add as if this one did not know it. A call
by the numbers of another architecture (32-bit, x32) ends the process.
"""

from __future__ import annotations

import platform
import struct

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""By the kernel's name of a machine: what the filter finds in `seccomp_data.arch`, and the column of the numbers."""

# By name, the numbers on x86_64 and on aarch64, which lacks some old ones.
COMPUTING: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "futex": (202, 98),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "close": (3, 57),
    "close_range": (436, 436),
    "fstat": (5, 80),
    # How glibc writes fstat; it also says whether a path exists and how large it is.
    "newfstatat": (262, 79),
    "lseek": (8, 62),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getpriority": (140, 141),
    "getcwd": (79, 17),
    "getrandom": (318, 278),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "umask": (95, 166),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "arch_prctl": (158, None),
    "membarrier": (324, 283),
    "wait4": (61, 260),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "restart_syscall": (219, 128),
}
"""What Python needs to compute, to wait and to end."""

FILES: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "sendfile": (40, 71),
}
"""What reads files and makes new ones. Nothing deletes or renames one: what was deleted while open or mapped would take
space that nobody sees. Nothing changes modes, owners, times or attributes, which no Landlock rule holds back."""

OWN_PID = 0xFFFFFFF1
"""Stands in a filter for the number of the process, which is known where the filter is installed."""

THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
"""With which glibc and musl make a thread; by other flags `clone` makes processes."""
FCNTL = (0, 1, 2, 3, 4, 1030)
"""Duplicates of a descriptor, its flags. No F_SETOWN and F_SETSIG, by which a file sends signals to any process."""
IOCTL = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
"""Whether this is a terminal, its size, bytes to read, close on exec. No TIOCSTI, no FIOSETOWN."""
O_TMPFILE = 0x400000
RLIMIT_STACK = 3
NEWER = 450
"""The first number, of both architectures, of calls that came after 2021: none of the list is among them."""

ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

Instruction = tuple[int, int, int, int]
"""`(code, jump if true, jump if false, k)`."""


def supported() -> bool:
    return platform.machine() in ARCHITECTURES


def compiled(files: bool, machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, with `OWN_PID` for the process's number.

    Args:
        files: whether the program may open files; what it finds there is another's business.
        machine: default this one.
    """
    arch, column = ARCHITECTURES[machine or platform.machine()]
    program = [_load(4), _jump(EQUAL, arch, 1, 0), _return(KILL_PROCESS), _load(0)]
    if column == 0:
        # The numbers of the x32 ABI.
        program += [_jump(AT_LEAST, 0x40000000, 0, 1), _return(KILL_PROCESS)]
    # Libraries have something older for what a kernel does not know.
    program += [_jump(AT_LEAST, NEWER, 0, 1), _return(ERRNO | ENOSYS)]
    for numbers in [*COMPUTING.values(), *(FILES.values() if files else ())]:
        number = numbers[column]
        if number is not None:
            program += [_jump(EQUAL, number, 0, 1), _return(ALLOW)]
    for numbers, block in _conditional(files):
        number = numbers[column]
        if number is not None:
            program += [_jump(EQUAL, number, 0, len(block)), *block]
    program.append(_return(ERRNO | EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _conditional(files: bool) -> list[tuple[tuple[int | None, int | None], list[Instruction]]]:
    """Numbers of calls that are allowed with some arguments, and what decides there; each ends with a return."""
    allow, deny = _return(ALLOW), _return(ERRNO | EPERM)
    # These take 32 bits of a register, so its other half does not count.
    own = _one_of(0, (OWN_PID,))
    readable = [(257, 56, 2), (2, None, 1)] if files else []
    return [
        *(
            ((x86, arm), [_load_argument(flags), _jump(ANY_BIT, O_TMPFILE, 0, 1), deny, allow])
            for x86, arm, flags in readable
        ),
        ((72, 25), _one_of(1, FCNTL)),
        ((16, 29), _one_of(1, IOCTL)),
        # clone3 and openat2: nothing is known of what a pointer leads to; libraries fall back to older ones.
        ((435, 435), [_return(ERRNO | ENOSYS)]),
        ((437, 437), [_return(ERRNO | ENOSYS)]),
        ((56, 220), _one_of(0, THREAD_FLAGS)),
        ((62, 129), own),
        ((234, 131), own),
        # prlimit64: of itself, without a new limit (a null pointer, both halves). Scripts that recurse ask for a larger
        # stack, which the hard limit and that of the address space bound.
        (
            (302, 261),
            [
                _load_argument(1),
                _jump(EQUAL, RLIMIT_STACK, 0, 4),
                _load_argument(0),
                _jump(EQUAL, 0, 1, 0),
                _jump(EQUAL, OWN_PID, 0, 1),
                allow,
                _load_argument(2),
                _jump(EQUAL, 0, 1, 0),
                deny,
                _load_argument(2, 4),
                _jump(EQUAL, 0, 1, 0),
                deny,
                *_one_of(0, (0, OWN_PID)),
            ],
        ),
    ]


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    tests = [step for value in values for step in (_jump(EQUAL, value, 0, 1), _return(ALLOW))]
    return [_load_argument(argument), *tests, _return(ERRNO | EPERM)]


def _load(offset: int) -> Instruction:
    return LOAD, 0, 0, offset


def _load_argument(index: int, half: int = 0) -> Instruction:
    return _load(16 + 8 * index + half)


def _jump(test: int, value: int, if_true: int, if_false: int) -> Instruction:
    return test, if_true, if_false, value


def _return(action: int) -> Instruction:
    return RETURN, 0, 0, action
