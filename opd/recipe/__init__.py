"""The recipe: its tree (the types), its reading (YAML, overrides, limits) and its explaining (what is wrong)."""

from opd.files.recipes import find_recipe, shipped_recipes
from opd.recipe.blocks import Batch, Checkpoint, Failures, Hardware, Tracking
from opd.recipe.explaining import all_keys
from opd.recipe.reading import apply_override, json_schema, load_recipe, parse_recipe
from opd.recipe.tree import Recipe, axis_of, differences

__all__ = [
    "Batch",
    "Checkpoint",
    "Failures",
    "Hardware",
    "Recipe",
    "Tracking",
    "all_keys",
    "apply_override",
    "axis_of",
    "differences",
    "find_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
]
