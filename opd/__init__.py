"""On-policy distillation: a student learns on states that it visits itself, under dense supervision from teachers."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.api import Result, chain, distill, execute
    from opd.callbacks import Callback
    from opd.errors import DataError, IncompatibleError, ModelError, OpdError, RecipeError, RunError, SelfTestError
    from opd.merging import merge
    from opd.recipe import Recipe, load_recipe

__version__ = "0.1.0"

# torch and oneDNN keep what they made for a shape, and buffers with it, for the last 1024 shapes. Steps of texts have
# new shapes nearly every time: in bfloat16 a run on a CPU grew by some ten megabytes a step. Read when torch first
# multiplies; who sets them otherwise is left alone.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "32")

# Names are loaded when first used: `import opd` stays light, and the command line can set thread policies before
# torch starts its threads.
_HOMES = {
    "opd.api": ("Result", "chain", "distill", "execute"),
    "opd.callbacks": ("Callback",),
    "opd.errors": (
        "DataError",
        "IncompatibleError",
        "ModelError",
        "OpdError",
        "RecipeError",
        "RunError",
        "SelfTestError",
    ),
    "opd.merging": ("merge",),
    "opd.recipe": ("Recipe", "load_recipe"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Callback",
    "DataError",
    "IncompatibleError",
    "ModelError",
    "OpdError",
    "Recipe",
    "RecipeError",
    "Result",
    "RunError",
    "SelfTestError",
    "chain",
    "distill",
    "execute",
    "load_recipe",
    "merge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'opd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
