"""`opd create-policy`: a blank policy for the environments that a recipe plays in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd.acting.creation import create_policy
from opd.acting.lerobot import ranges
from opd.choice import kind_of
from opd.environments.control import Control
from opd.environments.rows import body_of
from opd.errors import RecipeError
from opd.prompts.base import Prompts
from opd.prompts.episodes import EpisodePrompts
from opd.recipe import load_recipe


def new_policy(
    folder: Path,
    recipe: str,
    reads: Sequence[str],
    queries: bool = True,
    demonstrations: Path | None = None,
    overwrite: bool = False,
    **sizes: int,
) -> Path:
    """Write a blank policy that has the body and the words of a recipe's environments, those of its evaluation too.

    Args:
        demonstrations: a data set whose range of numbers it reads as -1 to 1.

    Raises:
        RecipeError: the recipe plays in no environment, or in several with other bodies.
        ModelError: see `create_policy`; or the demonstrations are of another body.
        DataError: the demonstrations do not say their range.
    """
    seen = {} if demonstrations is None else ranges(demonstrations)
    resolved = load_recipe(recipe, [])
    sources: list[Prompts] = [*resolved.prompts, *resolved.evaluation.prompts]
    played = [source.environment for source in sources if isinstance(source, EpisodePrompts)]
    found = [environment for environment in played if isinstance(environment, Control)]
    if not found:
        raise RecipeError(f"recipe {recipe!r} plays in no environment: neither prompts nor evaluation.prompts are of "
                          "kind episodes")  # fmt: skip
    bodies = [body_of(environment) for environment in found]
    other = next((i for i, body in enumerate(bodies) if body != bodies[0]), None)
    if other is not None:
        raise RecipeError(
            f"environments {kind_of(found[0])!r} and {kind_of(found[other])!r} of recipe {recipe!r} have other bodies "
            f"({bodies[0]} and {bodies[other]}); one policy has one"
        )
    words = [instruction for environment in found for instruction in environment.tasks().values()]
    return create_policy(
        folder,
        bodies[0],
        words,
        key=kind_of(found[0]),
        reads=reads,
        queries=queries,
        seen=seen,
        overwrite=overwrite,
        **sizes,
    )
