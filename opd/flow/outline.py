"""The shape of a flow model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd.errors import IncompatibleError, ModelError, first_line
from opd.flow.architectures import FACTOR, KNOWN, PROMPT_TOKENS
from opd.flow.encoder import PromptTable
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
from opd.planning import DTYPE_BYTES, Shape

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel


@dataclass(frozen=True)
class Outline:
    """A student's transformer on the meta device, and what its models share with it.

    Attributes:
        config: of the transformer without adapters.
        encoder: the prompt table, if it has one; else text encoders and a VAE lie beside it.
        places: tokens of a prompt.
        latent: side of a latent.
    """

    transformer: torch.nn.Module
    config: Mapping[str, Any]
    encoder: PromptTable | None
    places: int
    latent: int

    @property
    def factor(self) -> int:
        """Pixels of the side of a latent's number."""
        return FACTOR if self.encoder is None else 1

    @property
    def numbers(self) -> int:
        """Of a latent."""
        return int(self.config["in_channels"] * self.latent**2)

    def forward(self) -> tuple[torch.Tensor, ...]:
        """The transformer's answer to one latent and a prompt."""
        return one_pass(self.transformer, self.config, self.latent, self.places)


def student_shape(
    settings: FlowSettings,
    resolution: int | None,
    notes: list[str],
    adapted: Callable[[torch.nn.Module], torch.nn.Module],
) -> Shape:
    """The shape of a student; its `model` is an `Outline`. `adapted` puts the adapters on that are trained.

    Raises:
        ModelError: what a run would refuse too, in so far as it can be seen without the transformer's weights.
    """
    base, encoder, places = look(settings, notes)
    config = base.config
    merged(base, settings, notes)
    with torch.device("meta"):
        model = adapted(base)
    parameters = sum(p.numel() for p in model.parameters())
    latent = latent_size(config, FACTOR if encoder is None else 1, resolution)
    return Shape(
        name=settings.model,
        parameters=parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weight_bytes=DTYPE_BYTES.get(settings.dtype, 4) * parameters,
        model=Outline(model, config, encoder, places, latent),
    )


def teacher_shape(settings: FlowSettings, student: Shape, notes: list[str]) -> Shape:
    """The shape of a teacher of such a student.

    Raises:
        ModelError: as for a student.
        IncompatibleError: its latents are not the student's.
    """
    own = student.model
    assert isinstance(own, Outline)
    found, _, _ = look(settings, notes, beside_pipeline=own.encoder is None)
    latent_size(found.config, own.factor, own.latent * own.factor)
    if found.config["in_channels"] != own.config["in_channels"]:
        raise IncompatibleError(
            f"the student's latents have {own.config['in_channels']} channels and those of {settings.model} "
            f"{found.config['in_channels']}; use a teacher of the student's architecture"
        )
    merged(found, settings, notes)
    parameters = sum(p.numel() for p in found.parameters())
    size = DTYPE_BYTES.get(settings.dtype, student.size)
    return Shape(name=settings.model, parameters=parameters, trainable=0, weight_bytes=size * parameters)


def look(
    settings: FlowSettings, notes: list[str], beside_pipeline: bool = False
) -> tuple[SD3Transformer2DModel, PromptTable | None, int]:
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
            one_pass(model, model.config, model.config["patch_size"], places)
    except Exception as error:  # whatever a class of diffusers makes of numbers that do not fit together
        raise unloadable(settings.model, f"transformer/config.json contradicts itself: {first_line(error)}") from None
    return model, encoder, places


def _on_meta(config: Mapping[str, Any], name: str) -> SD3Transformer2DModel:
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


def merged(model: torch.nn.Module, settings: FlowSettings, notes: list[str]) -> None:
    """Look at the adapter that a model begins with."""
    if settings.adapter is not None and not check_adapter(model, settings.adapter):
        notes.append(f"{settings.adapter}: not read; the adapter is taken to fit")


def one_pass(model: torch.nn.Module, config: Mapping[str, Any], latent: int, places: int) -> tuple[torch.Tensor, ...]:
    """The answer of a transformer of this configuration to one latent and a prompt of as many places."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    return model(
        hidden_states=meta(1, config["in_channels"], latent, latent),
        encoder_hidden_states=meta(1, places, config["joint_attention_dim"]),
        pooled_projections=meta(1, config["pooled_projection_dim"]),
        timestep=meta(1),
        return_dict=False,
    )
