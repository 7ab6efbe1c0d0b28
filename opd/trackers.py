"""Trackers: which of those that a recipe names are there."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import tracking

from opd.errors import RecipeError

PACKAGES = {"comet_ml": "comet-ml"}
"""Name of the package that has a tracker, where it is another one."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise `RecipeError` for trackers that are not installed: `accelerate` would leave them out without a word."""
    there = {str(name) for name in tracking.get_available_trackers()}
    missing = [name for name in names if name not in there]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        rest = [name for name in names if name in there]
        raise RecipeError(
            f"tracking.trackers names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install {packages}, or set tracking.trackers=[{', '.join(rest)}]"
        )
