"""What a recipe for a policy that acts will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd.acting.model import ActionModel
from opd.environments.control import Control
from opd.environments.rows import body_of
from opd.errors import DataError, IncompatibleError, ModelError
from opd.plan.at_hand import prompts_at_hand
from opd.plan.outlined import OutlinedPlan, Rows, trained_memory
from opd.planning import count_text
from opd.policies.action_tokens import ActionTokensPolicy
from opd.prompts.episodes import EpisodePrompts
from opd.recipe import Recipe

WORDS = 24
"""Tokens of an instruction, for the length of the sequence."""


@dataclass(frozen=True, kw_only=True)
class ActionPlan(OutlinedPlan):
    """The plan of a recipe; `memory` is without the simulators' own."""

    environments: tuple[str, ...]
    episodes: int
    decisions: int
    tokens: int
    sequence: int

    def of_step(self) -> dict[str, Any]:
        step = {"episodes": self.episodes, "decisions": self.decisions, "action_tokens": self.tokens}
        return {"environments": list(self.environments), "step": step}

    def rows_of_step(self) -> Rows:
        return [
            *(("environment", name) for name in self.environments),
            ("episodes", str(self.episodes)),
            ("decisions", str(self.decisions)),
            ("action tokens", count_text(self.tokens)),
            ("places of a sequence", str(self.sequence)),
            ("whole run, episodes", count_text(self.steps * self.episodes)),
        ]


def plan_acting(recipe: Recipe) -> ActionPlan:
    """The plan of a recipe whose student acts; no weights are read."""
    student = recipe.student
    assert isinstance(student, ActionTokensPolicy)
    notes = ["what simulators take, and passes without gradients (rollout.worlds, a teacher's batch), is not counted"]
    own = student.shape(notes)
    model = own.model
    assert isinstance(model, ActionModel)
    layout = model.layout
    check_teacher = getattr(recipe.rollout, "check_teacher", None)
    if check_teacher is not None:
        check_teacher([teacher.name for teacher in recipe.teacher])
    prompts_at_hand(recipe, notes)
    environments = played_in(recipe)
    for environment in environments:
        check(environment, model, notes)
    episodes = recipe.batch.prompts * recipe.batch.group
    limits = [-(-environment.longest // layout.chunk) for environment in environments]
    each = min([recipe.rollout.longest, *([max(limits)] if limits else [])])
    decisions = episodes * each
    sequence = 2 + layout.patches + bool(layout.proprio) + bool(layout.state) + WORDS + layout.tokens
    moving = own.trainable * own.size
    pixels = layout.cameras * 3 * layout.pixels**2
    memory = {
        **trained_memory(own, moving, recipe),
        "observations": decisions * (pixels + 4 * (layout.proprio + layout.state)),
    }
    models = {"student": own}
    for i, shape in enumerate(shape for teacher in recipe.teacher for shape in teacher.shapes(own, notes)):
        models[f"teacher {i}"] = shape
        memory[f"teacher {i} weights"] = shape.weight_bytes
        taught = shape.model
        if isinstance(taught, ActionModel):
            for name in ("chunk", "dimensions", "bins"):
                if getattr(taught.layout, name) != getattr(layout, name):
                    raise IncompatibleError(
                        f"{name} is {getattr(layout, name)} for the student and {getattr(taught.layout, name)} for "
                        f"{shape.name}; take a teacher of the student's layout"
                    )
            if not taught.statistics.key == model.statistics.key == shape.name:
                model.statistics.check(taught.statistics, shape.name)
        memory[f"teacher {i}'s answers"] = decisions * layout.tokens * shape.size * max(shape.width, layout.bins)
    passes = min(recipe.batch.micro, episodes) * each
    # Of each layer its input, keys, values and the inner width stay for the backward pass.
    kept = layout.layers * sequence * (8 * layout.width + 3 * layout.feed_forward) * own.size
    if student.gradient_checkpointing:
        kept = kept // layout.layers + layout.layers * sequence * layout.width * own.size
    memory["activations of a micro-batch"] = passes * kept
    return ActionPlan(
        recipe=recipe.name,
        models=models,
        environments=tuple(dict.fromkeys(str(e.model_dump()["kind"]) for e in environments)),
        episodes=episodes,
        decisions=decisions,
        tokens=decisions * layout.tokens,
        sequence=sequence,
        steps=recipe.steps,
        memory=memory,
        notes=tuple(dict.fromkeys(notes)),
    )


def played_in(recipe: Recipe) -> list[Control]:
    """Environments of a recipe's prompts, held-out ones too."""
    sources = [*recipe.prompts, *recipe.evaluation.prompts]
    found = [source.environment for source in sources if isinstance(source, EpisodePrompts)]
    return [environment for environment in found if isinstance(environment, Control)]


def check(environment: Control, model: ActionModel, notes: list[str]) -> None:
    """Raise `DataError` where the student cannot act in an environment; of one that cannot be made here, a note."""
    kind = environment.model_dump()["kind"]
    if environment.remote is not None:
        notes.append(f"{environment.remote}: not here; environment {kind!r} is taken to fit")
        return
    try:
        body = body_of(environment)
    except ModelError as error:
        notes.append(f"environment {kind!r} is not looked at: {error}")
        return
    why = model.layout.misfit(body)
    if why is not None:
        raise DataError(f"the policy does not fit environment {kind!r}: {why}; make it for this environment")
