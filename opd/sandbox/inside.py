"""What runs in a sandboxed process: it takes its own rights away, runs the program, then tests of it.

Started by its text (`python -I -S -c`), with the standard library alone. Two messages come on one pipe, each eight
bytes of length and JSON: the settings with the program, and, read only when the program has run, the tests with a
secret. On another pipe it says `ready` when it is confined, `memory` where the program found none, and the secret with
the number of each test that passed.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import json
import os
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OWN_PID = 0xFFFFFFF1
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PDEATHSIG, SET_SECCOMP, CAPBSET_DROP, SET_NO_NEW_PRIVS, CAP_AMBIENT = 1, 22, 24, 38, 47


def received(pipe: int) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(_exactly(pipe, int.from_bytes(_exactly(pipe, 8), "little")))
    return message


def _exactly(pipe: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(pipe, min(count, 1 << 20))
        if not part:
            raise EOFError("the message ended early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def set_limits(limits: dict[str, int], must: bool) -> None:
    """Hard limits by the names of `resource`; systems without one are passed over unless all `must` be set."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    for name, value in limits.items():
        try:
            which = getattr(resource, name)
            # What Python took to start is not the program's.
            value += int(usage.ru_utime + usage.ru_stime + 1) if name == "RLIMIT_CPU" else 0
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
        except (AttributeError, ValueError, OSError):
            if must:
                raise


class Kernel:
    """Calls of Linux that Python has no function for; each raises `OSError` when it fails."""

    def __init__(self) -> None:
        import ctypes

        self.ctypes, self.libc = ctypes, ctypes.CDLL(None, use_errno=True)

    def check(self, result: int, what: str) -> int:
        if result < 0:
            number = self.ctypes.get_errno()
            raise OSError(number, f"{what}: {os.strerror(number)}")
        return result

    def prctl(self, option: int, a: int = 0, b: int = 0, what: str = "prctl") -> int:
        long = self.ctypes.c_ulong
        return self.check(self.libc.prctl(option, long(a), long(b), long(0), long(0)), what)

    def drop_capabilities(self) -> None:
        """None to have, to gain by a file or to pass on: who is root keeps the files of root alone."""
        for capability in range(64):
            try:
                self.prctl(CAPBSET_DROP, capability)
            except OSError:
                # Behind the last one of this kernel, or without the right to: then none can be gained anyway.
                break
        header = (self.ctypes.c_uint32 * 2)(0x20080522, 0)
        self.check(self.libc.capset(header, (self.ctypes.c_uint32 * 6)()), "capset")

    def landlock(self, rules: dict[str, Any]) -> None:
        """`rules`: handled rights (files, network, scopes), and of paths what is allowed beneath each."""
        c = self.ctypes
        handled = (c.c_uint64 * 3)(*rules["handled"])
        size = 8 * rules["words"]
        ruleset = self.check(self.libc.syscall(LANDLOCK_CREATE, handled, c.c_size_t(size), 0), "landlock ruleset")
        for path, rights in rules["paths"]:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = rights.to_bytes(8, "little") + beneath.to_bytes(4, "little")
            self.check(self.libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock rule for {path}")
            os.close(beneath)
        self.check(self.libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock")
        os.close(ruleset)

    def seccomp(self, instructions: bytes) -> None:
        own = instructions.replace(OWN_PID.to_bytes(4, "little"), os.getpid().to_bytes(4, "little"))
        c = self.ctypes

        array = c.create_string_buffer(own, len(own))
        # struct sock_fprog: a number of 16 bits, and a pointer where pointers are aligned.
        program = (c.c_size_t * 2)(len(own) // 8, c.addressof(array))
        self.prctl(SET_SECCOMP, 2, c.addressof(program), what="seccomp")


def confine(settings: dict[str, Any]) -> None:
    kernel = Kernel() if settings["confined"] else None
    for name in settings["modules"]:
        try:
            __import__(name)
        except ImportError:
            continue
    if kernel is not None:
        kernel.prctl(PDEATHSIG, 9)
        if settings["parent"] and os.getppid() != settings["parent"]:
            # It ended before it could take us along.
            os._exit(1)
        kernel.prctl(SET_NO_NEW_PRIVS, 1)
        kernel.drop_capabilities()
        if settings["landlock"]:
            kernel.landlock(settings["landlock"])
    set_limits(settings["limits"], settings["confined"])
    if kernel is not None:
        kernel.seccomp(bytes.fromhex(settings["filter"]))


def run(requests: int, replies: int) -> None:
    settings = received(requests)
    confine(settings)
    os.write(replies, b"ready\n")
    testing = settings["testing"]
    module = types.ModuleType("program" if testing else "__main__")
    sys.modules[module.__name__] = module
    sys.argv[:] = ["program.py"]
    # By `-S` nobody set them, and scripts end by them.
    builtins.exit, builtins.quit = (_sitebuiltins.Quitter(name, "Ctrl-D") for name in ("exit", "quit"))
    before, out = dict(vars(builtins)), sys.stdout
    try:
        exec(compile(settings["program"], "program.py", "exec", dont_inherit=True), vars(module))
    except MemoryError:
        os.write(replies, b"memory\n")
        raise
    if testing:
        test(module, before, received(requests), replies)
        # What the program left behind, threads and functions at exit, has no say any more.
        try:
            out.flush()
        finally:
            os._exit(0)


def test(module: types.ModuleType, before: dict[str, Any], message: dict[str, Any], replies: int) -> None:
    """Run tests in the program's names and the builtins of before; all of them, or up to the first that fails."""
    names = {**vars(module), "__builtins__": before, "__name__": "tests"}
    for number, text in enumerate(message["tests"]):
        try:
            exec(compile(text, "tests.py", "exec", dont_inherit=True), names)
        except BaseException as error:
            if isinstance(error, MemoryError):
                os.write(replies, b"memory\n")
            os.write(2, f"test {number}: {type(error).__name__}\n".encode())
            if not message["all"]:
                return
        else:
            os.write(replies, f"{message['secret']} {number}\n".encode())


if __name__ == "__main__":
    run(*(int(number) for number in sys.argv[1:3]))
