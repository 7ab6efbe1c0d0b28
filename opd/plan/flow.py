"""What a recipe for a flow model will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd.flow.encoder import check_prompts
from opd.flow.outline import Outline
from opd.plan.at_hand import prompts_at_hand
from opd.planning import Shape, bytes_text, count_text, saved_bytes
from opd.policies.flow_transformer import FlowTransformer
from opd.recipe import Recipe


@dataclass(frozen=True)
class FlowPlan:
    """The plan of a recipe; `memory` in bytes by part, without VAE and text encoders."""

    recipe: str
    models: dict[str, Shape]
    trajectories: int
    sampled: int
    trained: int
    steps: int
    memory: dict[str, int]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "models": {
                role: {"name": s.name, "parameters": s.parameters, "trainable": s.trainable}
                for role, s in self.models.items()
            },
            "denoising_steps_per_step": {"sampled": self.sampled, "trained": self.trained},
            "memory_bytes": self.memory,
            "peak_memory_bytes": sum(self.memory.values()),
            "notes": list(self.notes),
        }

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        yield (
            "models",
            [
                (
                    f"{role}: {shape.name}",
                    f"{count_text(shape.parameters)} parameters, {count_text(shape.trainable)} trained",
                )
                for role, shape in self.models.items()
            ],
        )
        yield (
            "a step, at most",
            [
                ("trajectories", str(self.trajectories)),
                ("denoising steps sampled", str(self.sampled)),
                ("denoising steps trained on", str(self.trained)),
                ("whole run, denoising steps sampled", count_text(self.steps * self.sampled)),
            ],
        )
        rows = [(part, bytes_text(value)) for part, value in self.memory.items()]
        yield ("memory at the peak of a step", [*rows, ("sum", bytes_text(sum(self.memory.values())))])


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
    check_prompts([*training, *held_out], outline.encoder, recipe.max_prompt_tokens)
    trajectories = recipe.batch.prompts * recipe.batch.group
    learnt = trajectories * recipe.rollout.budget
    # Adapters are float32 whatever the weights are.
    moving = own.trainable * (own.size if student.lora is None else 4)
    averaged = getattr(recipe.update, "average", None) is not None
    memory = {
        "student weights": own.weight_bytes,
        "gradients": moving,
        "optimiser state": (3 if averaged else 2) * moving,
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
