"""No confinement: a process with limits, for programs that one trusts."""

from __future__ import annotations

import os

from opd.sandbox.base import Confinement


class Nothing(Confinement):
    """A program can read and write what its user can, start processes and reach the network."""

    kind = "none"
    confines = False

    def missing(self) -> str | None:
        return None if os.name == "posix" else "needs processes with limits, as Linux and macOS have"
