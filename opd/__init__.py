"""On-policy distillation: a student learns on states that it visits itself, under dense supervision from teachers."""

from opd.api import Result, distill, execute
from opd.errors import (
    DataError,
    IncompatibleError,
    ModelError,
    OpdError,
    RecipeError,
    RunError,
    SelfTestError,
)
from opd.recipe import Recipe, load_recipe

__all__ = [
    "DataError",
    "IncompatibleError",
    "ModelError",
    "OpdError",
    "Recipe",
    "RecipeError",
    "Result",
    "RunError",
    "SelfTestError",
    "distill",
    "execute",
    "load_recipe",
]
__version__ = "0.1.0"
