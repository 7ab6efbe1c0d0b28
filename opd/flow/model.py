"""A transformer that predicts a velocity, with its time grid, its prompt encoder and its image coder."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from safetensors import SafetensorError

from opd.choice import Settings
from opd.errors import IncompatibleError, ModelError, first_line
from opd.flow.encoder import Condition, PromptEncoder, PromptTable, Shared, TextEncoders
from opd.merging.adapters import PEFT_PREFIX
from opd.merging.adapters import write as write_adapter
from opd.merging.weights import ADAPTER_FILES, Weights

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from opd.policies import Student
    from opd.teachers import LiveTeacher

TABLE = "prompt_table"
"""Folder of the prompt table of a model that works on pixels."""


ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "return_dict")
"""What a transformer is called with."""

CONFIGURED = ("sample_size", "patch_size", "in_channels", "pos_embed_max_size")
"""What a transformer's configuration says of the images that it can draw."""


class FlowSettings(Settings):
    """How a model is loaded; shared by students and teachers."""

    model: str = Field(
        description="A folder or hub name of a diffusers pipeline (StableDiffusion3Pipeline), or a folder with a "
        "transformer, a scheduler and a prompt_table"
    )
    adapter: str | None = Field(None, description="A LoRA adapter of peft to merge into the transformer's weights")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")

    @field_validator("revision")
    @classmethod
    def _of_a_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        model = str(info.data.get("model"))
        if value is not None and Path(model).expanduser().exists():
            raise ValueError(f"model {model!r} is not on the hub and has no revisions; remove the key")
        return value

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the weights; auto is the student's, and of a student float32"
    )


class FlowModel(torch.nn.Module):
    """`forward` gives the guided velocity. Times run from 1 (noise) to 0 (image). A deep copy has weights of its own
    and the same scheduler, VAE and text encoders.

    Args:
        transformer: takes `hidden_states`, `timestep`, `encoder_hidden_states`, `pooled_projections`, as diffusers'
            `SD3Transformer2DModel` does, and predicts `noise - data`.
        scheduler: a `FlowMatchEulerDiscreteScheduler`, for its grid of times.
        encoder: of prompts.
        pipeline: the diffusers pipeline that the parts come from, with its VAE; None for a model of pixels.
        resolution: of images, in pixels; default what the transformer was made for, and its default from now on.

    Raises:
        ModelError: parts that are no flow model together, or a resolution that they cannot draw.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoder: PromptEncoder,
        pipeline: StableDiffusion3Pipeline | None = None,
        resolution: int | None = None,
    ):
        super().__init__()
        self.transformer, self.encoder = transformer, encoder
        check_parts(self.base, scheduler.config, encoder, "the model")
        if not hasattr(scheduler, "sigmas"):
            raise ModelError(
                f"the model: {type(scheduler).__name__} has no sigmas; take a FlowMatchEulerDiscreteScheduler"
            )
        # Not submodules, so that copies share them.
        self.parts = Shared(scheduler=scheduler, pipeline=pipeline)
        factor = 1 if pipeline is None else int(pipeline.vae_scale_factor)
        size = latent_size(self.base.config, factor, resolution)
        self.shape = (int(self.base.config["in_channels"]), size, size)
        self.resolution = size * factor
        if size != self.base.config["sample_size"]:
            # What it is trained at is what it draws by default once it is saved, in plain diffusers too.
            self.base.register_to_config(sample_size=size)
            if pipeline is not None:
                pipeline.default_sample_size = size
        self._grids: dict[int, torch.Tensor] = {}

    @property
    def base(self) -> SD3Transformer2DModel:
        """The diffusers model, without a peft wrapper."""
        model: Any = self.transformer
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return self.parts.scheduler

    @property
    def pipeline(self) -> StableDiffusion3Pipeline | None:
        return self.parts.pipeline

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def grid(self, steps: int) -> torch.Tensor:
        """float32 `[steps + 1]`: the scheduler's times from 1 to 0, its shift included."""
        if steps not in self._grids:
            scheduler: Any = type(self.scheduler).from_config(self.scheduler.config)
            scheduler.set_timesteps(steps)
            self._grids[steps] = scheduler.sigmas.float()
        return self._grids[steps].to(self.device)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        conditions: Sequence[Condition],
        counts: Sequence[int],
        guidance: Sequence[float],
    ) -> torch.Tensor:
        """`[N, C, H, W]` velocity `v_0 + g (v_c - v_0)` at latents `[N, C, H, W]` and times `[N]`.

        Args:
            conditions: B of the encoder's; condition b belongs to `counts[b]` neighbouring latents.
            guidance: B scales g; where all are 1 the unconditional velocity v_0 is not computed.
        """
        repeats = torch.tensor(counts, device=x.device)
        hidden, pooled = (part.repeat_interleave(repeats, 0) for part in self.encoder(conditions))
        if all(g == 1.0 for g in guidance):
            return self._velocity(x, t, hidden, pooled)
        nothing = self.encoder(self.encoder.encode([""]))
        both = (
            torch.cat([part.expand_as(whole), whole]) for part, whole in zip(nothing, (hidden, pooled), strict=True)
        )
        free, bound = self._velocity(x.repeat(2, 1, 1, 1), t.repeat(2), *both).chunk(2)
        scale = torch.tensor(guidance, device=x.device).repeat_interleave(repeats).view(-1, 1, 1, 1)
        return free + scale * (bound - free)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        dtype = self.base.dtype
        return self.transformer(
            hidden_states=x.to(dtype),
            timestep=t * self.scheduler.config["num_train_timesteps"],
            encoder_hidden_states=hidden.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def images(self, latents: torch.Tensor) -> np.ndarray:
        """float32 `[B, H, W, 3]` in 0..1 of latents `[B, C, H, W]`."""
        if self.pipeline is not None:
            vae = self.pipeline.vae
            latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            latents = vae.decode(latents, return_dict=False)[0]
        pixels = (latents.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return np.ascontiguousarray(pixels.cpu().numpy())

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """float32 `[B, C, h, w]` of images `[B, 3, H, W]` in -1..1; with a VAE the mode of its posterior."""
        if self.pipeline is None:
            return images.to(self.device)
        vae = self.pipeline.vae
        found = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return ((found - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float()

    def save(self, folder: Path, adapter: bool = True) -> None:
        """`folder` in diffusers' own format; adapters are merged into the transformer's weights, this copy is not.

        Args:
            adapter: write the adapter too, in `folder/adapter`.
        """
        adapted: Any = self.transformer
        transformer: Any = copy.deepcopy(adapted).merge_and_unload() if adapted is not self.base else adapted
        if adapter and adapted is not self.base:
            # There are no embeddings of words, which peft would look for in the base's own files.
            write_adapter(folder / "adapter", adapted, embeddings=False)
        if self.pipeline is None:
            transformer.save_pretrained(folder / "transformer")
            self.scheduler.save_pretrained(folder / "scheduler")
            assert isinstance(self.encoder, PromptTable)
            self.encoder.save(folder / TABLE)
            return
        own = self.pipeline.transformer
        self.pipeline.register_modules(transformer=transformer)
        try:
            self.pipeline.save_pretrained(folder)
        finally:
            # It may be the caller's own, who goes on with it after a full disk too.
            self.pipeline.register_modules(transformer=own)


def flow_model_of(part: Student | LiveTeacher, which: str) -> FlowModel:
    """The flow model of a built student or teacher; `which` names it.

    Raises:
        IncompatibleError: it has none in this process.
    """
    found = getattr(part, "model", None)
    if not isinstance(found, FlowModel):
        raise IncompatibleError(
            f"{which} ({type(part).__name__}) has no flow model in this process, and another part of the recipe asks "
            "for it; take a student of policy flow_transformer and teachers of kind flow or self"
        )
    return found


def latent_size(config: Mapping[str, Any], factor: int, resolution: int | None) -> int:
    """Side of the latents of a transformer of this configuration; `factor` pixels are one place of them.

    Raises:
        ModelError: it cannot draw images of this resolution.
    """
    patch, most = config["patch_size"], config["pos_embed_max_size"] * config["patch_size"]
    side = int(config["sample_size"]) * factor if resolution is None else resolution
    if side % (factor * patch) or side > most * factor:
        own = ", the model's own" if resolution is None else ""
        raise ModelError(f"resolution is {side}{own}; give a multiple of {factor * patch}, at most {most * factor}")
    return side // factor


def check_parts(
    transformer: torch.nn.Module, scheduling: Mapping[str, Any], encoder: PromptEncoder | None, whose: str
) -> None:
    """Raise `ModelError` for parts that are no flow model together.

    Args:
        transformer: of diffusers; it may be on the meta device.
        scheduling: configuration of the scheduler.
        encoder: of prompts, where it is at hand.
        whose: parts they are, for the error.
    """
    kind, config = type(transformer).__name__, getattr(transformer, "config", {})
    taken = inspect.signature(type(transformer).forward).parameters
    lacking = [key for key in CONFIGURED if config.get(key) is None] + [key for key in ARGUMENTS if key not in taken]
    if lacking:
        raise ModelError(
            f"{whose}: {kind} has no {', '.join(lacking)}; a transformer with SD3Transformer2DModel's arguments is "
            "needed"
        )
    widths = {"out_channels": (config.get("out_channels"), config["in_channels"])}
    if isinstance(encoder, PromptTable):
        widths |= {
            "joint_attention_dim": (config.get("joint_attention_dim"), encoder.tokens.embedding_dim),
            "pooled_projection_dim": (config.get("pooled_projection_dim"), encoder.means.embedding_dim),
        }
    for key, (found, needed) in widths.items():
        if found not in (None, needed):
            source = "its in_channels are" if key == "out_channels" else "its prompt table is made for"
            raise ModelError(f"{whose}: {key} of its transformer is {found}, and {source} {needed}; both must be equal")
    if scheduling.get("use_dynamic_shifting"):
        raise ModelError(
            f"{whose}: its scheduler shifts times by image size, which is not supported; take one with "
            "use_dynamic_shifting false and a fixed shift"
        )


def unloadable(model: str, reason: str) -> ModelError:
    """The error of a model whose files are missing or damaged."""
    return ModelError(
        f"model {model!r} cannot be loaded ({reason}); give a folder with the files (opd create-flow-model writes a "
        "blank one), or a hub name that this machine can reach"
    )


def configurations(path: Path, model: str, beside_pipeline: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the transformer and the scheduler in a folder, after a look at whether the model's other parts are there.

    Args:
        model: what the folder is called in the recipe.
        beside_pipeline: of the student's, whose text encoders and VAE this model takes.

    Raises:
        ModelError: a part that is missing, or a configuration that cannot be read.
    """
    if not ((path / TABLE).is_dir() or beside_pipeline):
        # Of each component its library and class, both null where it was left out.
        for name, source in _read(path, "model_index.json", model).items():
            if isinstance(source, list) and all(source) and not (path / name).is_dir():
                raise unloadable(model, f"no folder {name}, which model_index.json names")
    return _read(path, "transformer/config.json", model), _read(path, "scheduler/scheduler_config.json", model)


def _read(path: Path, name: str, model: str) -> dict[str, Any]:
    try:
        found = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not JSON"
        raise unloadable(model, f"{name}: {problem}") from None
    if not isinstance(found, dict):
        raise unloadable(model, f"{name}: not a mapping")
    return found


def load_flow_model(
    settings: FlowSettings, device: torch.device | str, resolution: int | None = None, like: FlowModel | None = None
) -> FlowModel:
    """A model in eval mode on `device`. `like` another one, it shares that one's text encoders and VAE."""
    diffusers = import_diffusers()
    path = Path(settings.model).expanduser()
    if (path.exists() or settings.model.startswith((".", "/", "~"))) and not (path / "transformer").is_dir():
        raise ModelError(
            f"model {settings.model!r}: no folder with a transformer/ in it; give a diffusers pipeline's folder or name"
        )
    dtype = torch.float32 if like is None else like.base.dtype
    dtype = dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    options = {"revision": settings.revision, "torch_dtype": dtype}
    pipeline = None
    encoder: PromptEncoder
    beside_pipeline = like is not None and like.pipeline is not None
    if (path / "transformer").is_dir():
        configurations(path, settings.model, beside_pipeline)
    source = str(path) if path.is_dir() else settings.model
    try:
        if (path / TABLE).is_dir():
            encoder = PromptTable.load(path / TABLE)
        elif like is not None and like.pipeline is not None:
            encoder, pipeline = like.encoder, like.pipeline
        else:
            kind = diffusers.StableDiffusion3Pipeline
            # A pipeline that was saved without its third text encoder must be loaded without it.
            listed = kind.load_config(source, revision=settings.revision).items()
            absent = {name: None for name, part in listed if part == [None, None]}
            pipeline = kind.from_pretrained(source, **options, **absent).to(device)
            pipeline.set_progress_bar_config(disable=True)
            encoder = TextEncoders(pipeline)
        if pipeline is not None and like is None:
            transformer, scheduler = pipeline.transformer, pipeline.scheduler
        else:
            transformer = diffusers.AutoModel.from_pretrained(source, subfolder="transformer", **options)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
                source, subfolder="scheduler", revision=settings.revision
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise unloadable(settings.model, first_line(error)) from None
    check_parts(transformer, scheduler.config, encoder, f"model {settings.model!r}")
    if settings.adapter is not None:
        transformer = merge_adapter(transformer, settings.adapter)
        if pipeline is not None and like is None:
            pipeline.register_modules(transformer=transformer)
    return FlowModel(transformer, scheduler, encoder, pipeline, resolution).to(device).eval()


def merge_adapter(transformer: SD3Transformer2DModel, adapter: str) -> SD3Transformer2DModel:
    """The transformer with a peft adapter's product added to its weights."""
    folder = Path(adapter).expanduser()
    try:
        from peft import PeftModel

        check_adapter(transformer, adapter)
        found = str(folder) if folder.is_dir() else adapter
        return PeftModel.from_pretrained(transformer, found).merge_and_unload()
    except ImportError:
        raise ModelError("a model's adapter needs peft: pip install 'opd[flow]'") from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"adapter {adapter!r} cannot be loaded ({first_line(error, 'size mismatch')}); give the folder of a LoRA "
            "adapter that was trained on this model"
        ) from None


def check_adapter(transformer: torch.nn.Module, adapter: str) -> bool:
    """Whether an adapter lies on this machine. Of one that does, everything that can be seen without its numbers.

    Args:
        transformer: that it is for; it may be on the meta device.

    Raises:
        ModelError: no such folder, files that are missing or damaged, or factors of other weights than these.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1:
            raise ModelError(
                f"adapter {adapter!r}: no such folder; give one with adapter_config.json, as peft saves it"
            )
        return False
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"adapter {adapter!r}: no readable adapter_config.json ({first_line(error)}); save the adapter again"
        ) from None
    file = folder / ADAPTER_FILES[0]
    if kind != "LORA" or not file.is_file():
        return True
    shapes, own = Weights([file]).shapes, transformer.state_dict()
    for name, (_, a) in shapes.items():
        module, is_a, _ = name.partition(".lora_A.weight")
        b = shapes.get(f"{module}.lora_B.weight", ("", ()))[1]
        if not is_a or len(a) != 2 or len(b) != 2:
            continue
        weight = own.get(f"{module.removeprefix(PEFT_PREFIX)}.weight")
        if weight is None or weight.shape != (b[0], a[1]):
            has = "no such weight" if weight is None else f"one of {list(weight.shape)}"
            raise ModelError(
                f"adapter {adapter!r} changes a weight of {[b[0], a[1]]}, {module.removeprefix(PEFT_PREFIX)}, and the "
                f"transformer has {has}; give an adapter that was trained on this model"
            )
    return True


def import_diffusers() -> ModuleType:
    """The library, quiet about the parts that it reads and writes.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise ModelError("flow models need diffusers: pip install 'opd[flow]'") from None
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    return diffusers
