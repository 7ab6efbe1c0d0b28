"""What a recipe for a flow model will take, from configurations on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.choice import nested
from opd.errors import IncompatibleError, ModelError, first_line
from opd.flow.architectures import FACTOR, KNOWN, PROMPT_TOKENS
from opd.flow.encoder import PromptTable, check_prompts
from opd.flow.model import (
    TABLE,
    FlowSettings,
    check_adapter,
    check_parts,
    configurations,
    import_diffusers,
    latent_size,
    unloadable,
)
from opd.planning import bytes_text, count_text, prompts_at_hand, saved_bytes
from opd.policies.flow_transformer import FlowTransformer, check_settings, with_lora
from opd.recipe import Recipe
from opd.rollouts.sde import SDERollout
from opd.teachers.flow import FlowTeacher
from opd.teachers.self_teacher import SelfTeacher

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class FlowPlan:
    """The plan of a recipe; `memory` in bytes by part, without VAE and text encoders."""

    recipe: str
    models: dict[str, dict[str, Any]]
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
            "models": self.models,
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
                    f"{role}: {shape['name']}",
                    f"{count_text(shape['parameters'])} parameters, {count_text(shape['trainable'])} trained",
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


def make_flow_plan(recipe: Recipe) -> FlowPlan:
    """The plan of a recipe whose student is a flow transformer; no weights are read."""
    student = recipe.student
    assert isinstance(student, FlowTransformer)
    notes = [
        "VAE and text encoders, what they compute, and passes without gradients (rollout.batch, a teacher's batch) are "
        "not counted"
    ]
    base, encoder, places = _look(student, notes)
    config = base.config
    model = _adapted(base, student, notes)
    size = BYTES.get(student.dtype, 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    own: dict[str, Any] = {
        "name": student.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
    }
    factor = FACTOR if encoder is None else 1
    latent = latent_size(config, factor, student.resolution)
    for rollout in nested(recipe.rollout):
        if isinstance(rollout, SDERollout):
            rollout.check_teacher([teacher.name for teacher in recipe.teacher])
    check_settings(recipe)
    check_prompts(prompts_at_hand(recipe, notes) or [], encoder, recipe.max_prompt_tokens)
    numbers = config["in_channels"] * latent**2
    trajectories = recipe.batch.prompts * recipe.batch.group
    learnt = trajectories * recipe.rollout.budget
    # Adapters are float32 whatever the weights are.
    moving = own["trainable"] * (size if student.lora is None else 4)
    averaged = getattr(recipe.update, "average", None) is not None
    memory = {
        "student weights": size * own["parameters"],
        "gradients": moving,
        "optimiser state": (3 if averaged else 2) * moving,
        "trajectories": 4 * numbers * learnt,
    }
    models = {"student": own}
    teachers = [t for t in nested(recipe.teacher) if isinstance(t, FlowTeacher | SelfTeacher)]
    for i, teacher in enumerate(teachers):
        shape = {**own, "name": f"{student.model} (a copy)", "trainable": 0}
        if isinstance(teacher, FlowTeacher):
            found, _, _ = _look(teacher, notes, beside_pipeline=encoder is None)
            latent_size(found.config, factor, latent * factor)
            if found.config["in_channels"] != config["in_channels"]:
                raise IncompatibleError(
                    f"the student's latents have {config['in_channels']} channels and those of {teacher.model} "
                    f"{found.config['in_channels']}; use a teacher of the student's architecture"
                )
            _adapted(found, teacher, notes)
            shape = {**shape, "name": teacher.model, "parameters": sum(p.numel() for p in found.parameters())}
        models[f"teacher {i}"] = shape
        kept = BYTES.get(teacher.dtype, size) if isinstance(teacher, FlowTeacher) else size
        memory[f"teacher {i} weights"] = kept * shape["parameters"]
    # Of a routed teacher's routes one answers for each trajectory.
    memory["teachers' answers"] = 4 * numbers * learnt * len(recipe.teacher)
    passes = min(recipe.batch.micro, trajectories) * recipe.rollout.budget * (2 if student.guidance != 1 else 1)
    activations = passes * saved_bytes(model, lambda: _pass(model, latent, places))
    if student.gradient_checkpointing:
        tokens = (latent // config["patch_size"]) ** 2 + places
        layers = config["num_layers"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        activations = activations // layers + passes * layers * tokens * width * 4
    memory["activations of a micro-batch"] = activations
    if recipe.hardware.precision != "fp32":
        notes.append("activations are estimated in float32; bf16 computing holds somewhat less")
    sampled = trajectories * recipe.rollout.steps if isinstance(recipe.rollout, SDERollout) else 0
    return FlowPlan(
        recipe.name, models, trajectories, sampled, learnt, recipe.steps, memory, tuple(dict.fromkeys(notes))
    )


def _look(
    settings: FlowSettings, notes: list[str], beside_pipeline: bool = False
) -> tuple[Any, PromptTable | None, int]:
    """`(transformer, prompt table, places of a prompt)`, the transformer on the meta device.

    Args:
        beside_pipeline: of the student's, whose text encoders and VAE this model takes.

    Raises:
        ModelError: what a run would refuse too, in so far as it can be seen without the transformer's weights.
    """
    path = Path(settings.model).expanduser()
    encoder: PromptTable | None = None
    scheduling: dict[str, Any] = {}
    if (path / "transformer").is_dir():
        config, scheduling = configurations(path, settings.model, beside_pipeline)
        encoder = PromptTable.load(path / TABLE) if (path / TABLE).is_dir() else None
    elif settings.model in KNOWN:
        notes.append(f"{settings.model}: not read; its configuration is the one that comes with opd")
        config = KNOWN[settings.model]
    else:
        raise ModelError(
            f"model {settings.model!r}: no folder with a transformer/, and opd check knows the configurations of "
            f"{', '.join(KNOWN)} alone; give a folder, or write a blank model with opd create-flow-model"
        )
    model = _on_meta(config, settings.model)
    check_parts(model, scheduling, encoder, f"model {settings.model!r}")
    places = PROMPT_TOKENS if encoder is None else encoder.length
    try:
        with torch.no_grad():
            _pass(model, model.config["patch_size"], places)
    except Exception as error:  # whatever a class of diffusers makes of numbers that do not fit together
        raise unloadable(settings.model, f"transformer/config.json contradicts itself: {first_line(error)}") from None
    return model, encoder, places


def _on_meta(config: Mapping[str, Any], name: str) -> Any:
    """The transformer of a configuration, without weights."""
    cls = config.get("_class_name", "SD3Transformer2DModel")
    kind = getattr(import_diffusers(), str(cls), None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise unloadable(name, f"transformer/config.json names {cls!r}, which is no model of diffusers")
    try:
        with torch.device("meta"):
            return kind.from_config(dict(config))  # type: ignore[attr-defined]
    except Exception as error:  # whatever a class of diffusers makes of such settings
        raise unloadable(name, f"transformer/config.json makes no {cls}: {first_line(error)}") from None


def _adapted(model: Any, settings: FlowSettings, notes: list[str]) -> Any:
    """The transformer of a model, after a look at the adapter that it begins with; a student's with those to train."""
    if settings.adapter is not None and not check_adapter(model, settings.adapter):
        notes.append(f"{settings.adapter}: not read; the adapter is taken to fit")
    lora = settings.lora if isinstance(settings, FlowTransformer) else None
    with torch.device("meta"):
        return model if lora is None else with_lora(model, lora)


def _pass(model: Any, latent: int, places: int) -> Any:
    """The transformer's answer to one latent and a prompt of as many places."""
    config = model.config

    def meta(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    return model(
        hidden_states=meta(1, config["in_channels"], latent, latent),
        encoder_hidden_states=meta(1, places, config["joint_attention_dim"]),
        pooled_projections=meta(1, config["pooled_projection_dim"]),
        timestep=meta(1),
        return_dict=False,
    )
