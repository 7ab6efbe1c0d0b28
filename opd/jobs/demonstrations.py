"""`opd rollout` for policies that act: episodes as a data set of demonstrations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opd.acting.lerobot import Demonstration, write_demonstrations
from opd.assembly import build_models, compute_device, make_accelerator, readable
from opd.errors import RecipeError, RunError
from opd.files.ours import refuse_taken
from opd.files.whole import whole_folder
from opd.jobs.work import work_through
from opd.policies.action_tokens import ActionStudent
from opd.prompts import load_prompts
from opd.recipe import Recipe
from opd.rollouts import Request
from opd.rollouts.simulator import PlayingSettings, Simulator, SimulatorRollout
from opd.teachers import reasons
from opd.trajectories import Trajectories


def sample_demonstrations(
    recipe: Recipe, path: Path, *, draws: int = 1, prompts_per_shard: int = 64, quiet: bool = False
) -> tuple[int, int]:
    """Play every prompt of a recipe `batch.group` times a draw, and write the episodes that succeeded in LeRobot's
    format. Who acts is whom `rollout.teacher` names, else the student.

    Args:
        draws: of all prompts.
        prompts_per_shard: prompts that are played before the next ones begin.

    Returns:
        How many episodes were kept, and how many were played, those that were lost among them.

    Raises:
        OpdError: the folder holds something, the recipe plays nothing, or nothing succeeded.
    """
    if not isinstance(recipe.rollout, SimulatorRollout):
        raise RecipeError("opd rollout writes demonstrations of rollout 'simulator'; this recipe's plays no episodes")
    refuse_taken(path, False)
    recipe = recipe.at(0, recipe.steps)
    assert isinstance(recipe.rollout, SimulatorRollout)
    settings = recipe.rollout
    recipe.rollout.check_teacher([teacher.name for teacher in recipe.teacher])
    student, teachers, context = build_models(recipe, compute_device(recipe, make_accelerator(recipe)))
    assert isinstance(student, ActionStudent)
    for teacher in teachers:
        teacher.check_student(student, context)
    source = recipe.rollout.build(context, student, teachers)
    assert isinstance(source, Simulator)
    source.whole = True
    prompts = readable(recipe, load_prompts(recipe.prompts), [], student, *teachers, source)
    kept: list[Demonstration] = []
    played = 0
    parts = [prompts[first : first + prompts_per_shard] for first in range(0, len(prompts), prompts_per_shard)]

    def play(shard: int) -> None:
        nonlocal played
        here = parts[shard % len(parts)]
        asked: Request[PlayingSettings] = Request(
            here, recipe.batch.group, settings.budget, shard // len(parts), settings, context
        )
        made = source(asked)
        kept.extend(demonstrations(made.written(), source))
        played += len(made)

    try:
        work_through(range(draws * len(parts)), draws * len(parts), play, label="episodes", quiet=quiet)
    finally:
        source.close()
    if not kept:
        lost = f" (of those that were lost: {reasons([source])})" if source.failures() else ""
        raise RunError(
            f"none of {played} episodes succeeded{lost}, so there is nothing to demonstrate; let an expert act"
        )
    with whole_folder(path) as partial:
        write_demonstrations(partial, kept)
    return len(kept), played


def demonstrations(trajectories: Trajectories, source: Simulator) -> list[Demonstration]:
    """The episodes that succeeded, step by step, with the actions as they were played."""
    layout, found = source.layout, []
    for episode, actions in zip(trajectories.contexts, trajectories.completions(), strict=True):
        scaled = layout.actions.decode(actions.numpy()).reshape(-1, layout.dimensions)[: episode.steps]
        taken = source.actor.statistics.unscale(scaled).astype(np.float32)
        if episode.outcome == 1:
            found.append(Demonstration(episode.instruction, episode.each, taken, True))
    return found
