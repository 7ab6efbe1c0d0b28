"""Namespaces of its own, made by `bwrap`: a program sees Python's files and its folder, and no other process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from opd.sandbox import filters
from opd.sandbox.base import Confinement, files_of_python

HOME = "/scratch"


class Bubblewrap(Confinement):
    """All namespaces (users, processes, network, mounts, IPC, host name, cgroups) are new, no capability is left, and
    the filter of system calls holds within."""

    kind = "bubblewrap"
    wraps = True

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return "needs Linux"
        if not filters.supported():
            return "no list of system calls for this processor"
        return None if shutil.which("bwrap") else "bwrap is not installed: apt install bubblewrap"

    def home(self, scratch: Path) -> str:
        return HOME

    def command(self, scratch: Path) -> list[str]:
        shown: list[str] = []
        for path in files_of_python():
            # /lib is a link to usr/lib where the two were merged.
            link = path.is_symlink() and not path.readlink().is_absolute() and path.parent == Path("/")
            shown += ["--symlink", str(path.readlink()), str(path)] if link else ["--ro-bind", str(path), str(path)]
        return [
            *(shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"),
            *shown,
            *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
            *("--bind", str(scratch), HOME, "--chdir", HOME, "--hostname", "sandbox"),
            # The root is a file system in memory, of which nobody would count what is written there.
            *("--remount-ro", "/", "--"),
        ]

    @property
    def filter(self) -> bytes:
        return filters.compiled(files=True)
