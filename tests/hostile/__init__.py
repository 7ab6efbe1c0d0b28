"""Hostile programs, and what each would have changed outside of its sandbox.

A program tries its attack, and all that follows is seen from outside: files, sockets, signals, other processes, time
and memory. `outside.Outside` sets the scene up and names the damage; without any, the program was contained.
"""

from __future__ import annotations

from tests.hostile.escape import CONFINEMENT, VERDICT
from tests.hostile.reach import NETWORK, OTHER_PROCESSES, READING, WRITING
from tests.hostile.resources import MEMORY, OUTPUT_AND_DISK, PROCESSES, TIME

HOSTILE = (
    *PROCESSES,
    *MEMORY,
    *TIME,
    *NETWORK,
    *WRITING,
    *READING,
    *OTHER_PROCESSES,
    *OUTPUT_AND_DISK,
    *CONFINEMENT,
    *VERDICT,
)
