"""What a confinement is, and what a program may take."""

from __future__ import annotations

import os
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Ended = Literal["finished", "error", "time", "cpu", "memory", "output", "files", "threads", "killed"]
"""Why a program ended: by itself with exit status 0, or with another; at a limit; or by a signal."""


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
        seconds: of wall clock, from where it begins.
        cpu_seconds: of all of its threads together.
        memory: MiB of address space.
        output: bytes of standard output and standard error together.
        files: MiB that its files take together.
        entries: files and folders that it makes.
        threads: at once.
        open_files: descriptors, standard ones included.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 512
    output: int = 1 << 20
    files: int = 16
    entries: int = 256
    threads: int = 64
    open_files: int = 64

    @property
    def of_system(self) -> dict[str, int]:
        """The part that the system keeps, by the names of `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory << 20,
            "RLIMIT_FSIZE": self.files << 20,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Ran:
    """What a program did.

    Attributes:
        ended: why.
        exit: its exit status, less than 0 for a signal.
        stdout, stderr: what it wrote, up to the limit; bytes that are no UTF-8 are replaced.
        passed: numbers of the tests that passed.
        seconds: of wall clock, without the start of Python.
    """

    ended: Ended
    exit: int
    stdout: str
    stderr: str = field(repr=False)
    passed: frozenset[int]
    seconds: float


class Confinement(ABC):
    """What keeps a program in; one instance serves many programs at once."""

    kind: ClassVar[str]
    confines: ClassVar[bool] = True
    """False for what only limits: such a program can do what its user can."""
    modules: ClassVar[Sequence[str]] = ()
    """Modules that are loaded before the program runs, because it cannot load any itself."""
    wraps: ClassVar[bool] = False
    """Whether another program starts the sandboxed one, whose exit status then says 128 and more for a signal."""

    @abstractmethod
    def missing(self) -> str | None:
        """What this machine lacks for it, with the fix where there is one; None where it can be tried."""

    def command(self, scratch: Path) -> list[str]:
        """What stands before the interpreter on the command line."""
        return []

    def home(self, scratch: Path) -> str:
        """The scratch folder's path as the program sees it."""
        return str(scratch)

    @property
    def filter(self) -> bytes:
        """Of system calls; empty for none."""
        return b""

    def landlock(self, scratch: Path) -> Mapping[str, Any] | None:
        """Rules of Landlock as `inside.py` reads them."""
        return None


def interpreter() -> str:
    """This Python without its virtual environment: programs get the standard library."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def files_of_python() -> list[Path]:
    """Files and folders that the interpreter, its modules and the libraries of the system need to be read."""
    named = [
        interpreter(),
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        str(Path(sys.base_prefix, "lib")),
        *("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64"),
        *("/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"),
    ]
    found: list[Path] = []
    for path in dict.fromkeys(Path(name) for name in named):
        if path.exists() and not any(parent in found for parent in path.parents):
            found.append(path)
    return found
