"""What a recipe for a flow model will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd.assembly import or_skipped
from opd.errors import DataError
from opd.flow.encoder import check_prompts
from opd.flow.outline import Outline
from opd.plan.at_hand import prompts_at_hand
from opd.plan.outlined import OutlinedPlan, Rows, trained_memory
from opd.planning import count_text, saved_bytes
from opd.policies.flow_transformer import FlowTransformer
from opd.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class FlowPlan(OutlinedPlan):
    """The plan of a recipe; `memory` is without VAE and text encoders."""

    trajectories: int
    sampled: int
    trained: int

    def of_step(self) -> dict[str, Any]:
        return {"denoising_steps_per_step": {"sampled": self.sampled, "trained": self.trained}}

    def rows_of_step(self) -> Rows:
        return [
            ("trajectories", str(self.trajectories)),
            ("denoising steps sampled", str(self.sampled)),
            ("denoising steps trained on", str(self.trained)),
            ("whole run, denoising steps sampled", count_text(self.steps * self.sampled)),
        ]


def plan_flow(recipe: Recipe) -> FlowPlan:
    """The plan of a recipe whose student is a flow transformer; no weights are read."""
    student = recipe.student
    assert isinstance(student, FlowTransformer)
    notes = [
        "VAE and text encoders, what they compute, and passes without gradients (rollout.batch, a teacher's batch) are "
        "not counted"
    ]
    own = student.shape(notes)
    outline = own.model
    assert isinstance(outline, Outline)
    recipe.rollout.check_teacher([teacher.name for teacher in recipe.teacher])
    training, held_out = prompts_at_hand(recipe, notes) or ([], [])
    try:
        check_prompts([*training, *held_out], outline.encoder, recipe.max_prompt_tokens)
    except DataError as error:
        if not recipe.skip_bad_prompts:
            raise or_skipped([error]) from None
        notes.append(f"{error}: a run leaves such prompts out")
    trajectories = recipe.batch.prompts * recipe.batch.group
    learnt = trajectories * recipe.rollout.budget
    # Adapters are float32 whatever the weights are.
    moving = own.trainable * (own.size if student.lora is None else 4)
    memory = {
        **trained_memory(own, moving, recipe),
        "trajectories": 4 * outline.numbers * learnt,
    }
    models = {"student": own}
    for i, shape in enumerate(shape for teacher in recipe.teacher for shape in teacher.shapes(own, notes)):
        models[f"teacher {i}"] = shape
        memory[f"teacher {i} weights"] = shape.weight_bytes
    # Of a routed teacher's routes one answers for each trajectory.
    memory["teachers' answers"] = 4 * outline.numbers * learnt * len(recipe.teacher)
    passes = min(recipe.batch.micro, trajectories) * recipe.rollout.budget * (2 if student.guidance != 1 else 1)
    activations = passes * saved_bytes(outline.transformer, outline.forward)
    if student.gradient_checkpointing:
        config = outline.config
        tokens = (outline.latent // config["patch_size"]) ** 2 + outline.places
        layers = config["num_layers"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        activations = activations // layers + passes * layers * tokens * width * 4
    memory["activations of a micro-batch"] = activations
    if recipe.hardware.precision != "fp32":
        notes.append("activations are estimated in float32; bf16 computing holds somewhat less")
    return FlowPlan(
        recipe=recipe.name,
        models=models,
        trajectories=trajectories,
        sampled=trajectories * recipe.rollout.sampled,
        trained=learnt,
        steps=recipe.steps,
        memory=memory,
        notes=tuple(dict.fromkeys(notes)),
    )
