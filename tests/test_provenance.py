"""What a run records of the machine it ran on."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = "from opd.provenance import peak_memory_bytes; print(peak_memory_bytes())"
PARENT = f"""
import subprocess, sys
held = bytearray(900 * 2**20)
held[::4096] = b"x" * len(held[::4096])
print(subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system keeps no such number")
def test_a_peak_is_of_the_process_and_not_of_the_one_that_started_it():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(done.stdout) < 800 * 2**20
