"""What importing `opd` does to a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = "import opd.api, os, sys; print(len(os.listdir('/proc/self/task')), 'datasets' in sys.modules)"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads there")
def test_importing_starts_no_thread_and_no_library_that_is_not_needed():
    """Experiments fork their jobs from a process that has imported it all, which is safe with one thread alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", SAYS], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1", "False"]
