"""Where reproduction files lie and how they are loaded."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from opd.errors import RecipeError, nearest
from opd.reproductions.definition import Reproduction

PACKAGE = "reproductions"
"""The folder's name as a package, wherever it lies: jobs are found again by `reproductions.FILE:FUNCTION`."""


@dataclass(frozen=True)
class Entry:
    """A reproduction and where its things lie."""

    name: str
    file: Path
    reproduction: Reproduction

    @property
    def cache(self) -> Path:
        """Folder of its finished jobs."""
        return Path("runs/reproductions") / self.name

    @property
    def smoke_results(self) -> Path:
        return self.cache / "smoke-results.json"

    @property
    def home(self) -> Path:
        """Beside the file; in the cache for those that come in the wheel, which nobody commits to."""
        return self.cache if self.file.parent == _packaged() else self.file.parent / self.name

    @property
    def results(self) -> Path:
        return self.home / "results.json"

    @property
    def page(self) -> Path:
        """Among the docs for those of a checkout of `opd`."""
        docs = docs_folder()
        of_checkout = docs is not None and self.file.parent == reproduction_folder()
        return (docs if docs is not None and of_checkout else self.home) / f"{self.name}.md"


def reproduction_folder() -> Path:
    """Where the reproductions that come with `opd` lie: in the wheel, or at the top of a checkout."""
    packaged = _packaged()
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "reproductions"


def docs_folder() -> Path | None:
    """Where the pages of the reproductions of a checkout lie; None for a wheel."""
    folder = reproduction_folder()
    return None if folder == _packaged() else folder.parent / "docs" / "reproductions"


def shipped() -> dict[str, Entry]:
    """The reproductions that come with `opd`, by name. Files that define none are shared by those that do."""
    found = [_entry(path) for path in sorted(reproduction_folder().glob("*.py"))]
    return {entry.name: entry for entry in found if entry is not None}


def find(reference: str) -> Entry:
    """A path, or the name of a shipped reproduction (`on-policy`).

    Raises:
        RecipeError: there is none, or its file cannot be loaded.
    """
    path = Path(reference)
    if path.suffix == ".py" and path.is_file():
        entry = _entry(path.resolve())
        if entry is None:
            raise RecipeError(f"{path} defines no `reproduction`; see docs/reproductions/index.md")
        return entry
    names = [p.stem.replace("_", "-") for p in sorted(reproduction_folder().glob("*.py"))]
    wanted = path.stem.replace("_", "-")
    own = reproduction_folder() / f"{wanted.replace('-', '_')}.py"
    entry = _entry(own) if wanted in names else None
    if entry is None:
        known = ", ".join(shipped()) or "none yet"
        raise RecipeError(
            f"no reproduction {reference!r}{nearest(wanted, names)}; give a file that defines one, or one of: {known}"
        )
    return entry


def open_folder(folder: Path) -> None:
    """Make `folder` the package `reproductions`, so that its files can import each other and workers find them."""
    package = sys.modules.get(PACKAGE)
    if package is not None and list(package.__path__) == [str(folder)]:
        return
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package


def _entry(path: Path) -> Entry | None:
    open_folder(path.parent)
    try:
        module = importlib.import_module(f"{PACKAGE}.{path.stem}")
    except Exception as error:  # Whatever the file raises is its author's to mend.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        raise RecipeError(f"{path}:{line}: {type(error).__name__}: {error}") from None
    found = getattr(module, "reproduction", None)
    if not isinstance(found, Reproduction):
        return None
    return Entry(path.stem.replace("_", "-"), path, found)


def _packaged() -> Path:
    return Path(__file__).parent.parent / "_reproductions"
