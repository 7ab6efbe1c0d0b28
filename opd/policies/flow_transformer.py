"""A flow transformer as the student: full fine-tuning or LoRA of the velocity model of a diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, ValidationInfo, field_validator
from transformers import PreTrainedTokenizerBase

from opd.choice import Settings
from opd.context import Context
from opd.distributions import Distribution, Gaussian
from opd.distributions.transition import transition
from opd.errors import IncompatibleError, ModelError, SelfTestError
from opd.flow import evaluation
from opd.flow.denoising import believe, digits, labels
from opd.flow.encoder import PromptTable, TextEncoders, check_prompts
from opd.flow.guidance import Guidance
from opd.flow.model import FlowModel, FlowSettings, check_parts, load_flow_model
from opd.flow.outline import student_shape
from opd.pictures import data_address
from opd.planning import Shape
from opd.policies.base import LIVE, Policy, Student
from opd.policies.evaluation import Evaluation
from opd.policies.held_out import HeldOut, Measured, Moment
from opd.prompts import Prompt
from opd.provenance import read_origin
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from peft import PeftModel

    from opd.rollouts import HeldOutSampler
    from opd.teachers import LiveTeacher
    from opd.teachers.flow import LiveFlowTeacher, SelfFlowTeacher
    from opd.teachers.self_teacher import SelfTeacher

SHOWN_PIXELS = 128
"""Side of the images that logs keep, at most."""

TOO_NARROW = "float16 is too narrow for weights that are trained whole; use bfloat16, or lora"

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

NO_TOKENS = "it is for language, and a flow model draws no tokens"


class FlowLoRA(Settings):
    """Low-rank adapters of the transformer, by `peft`."""

    rank: int = Field(32, ge=1, le=16_384, description="Of the added matrices")
    alpha: int = Field(64, ge=1, description="Their product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Of the adapters' input while training")
    targets: list[str] = Field(
        [f"attn.{name}" for name in ATTENTION], min_length=1, description="Default the eight attention projections"
    )
    initial: Literal["gaussian", "uniform"] = Field("gaussian", description="Of the first factor; the second is zero")


class FlowTransformer(FlowSettings, Policy):
    """A transformer of diffusers that predicts a velocity (`SD3Transformer2DModel`)."""

    kind: Literal["flow_transformer"] = "flow_transformer"
    modality: ClassVar[str | None] = "flow"
    teacher: ClassVar[str] = "flow"
    answers: ClassVar[type[Distribution]] = Gaussian
    evaluation: ClassVar[type[Evaluation]] = evaluation.FlowEvaluation
    unused: ClassVar[Mapping[str, str]] = {"end_tokens": NO_TOKENS, "temperature": NO_TOKENS}
    of_live: ClassVar[tuple[str, ...]] = ("guidance", "lora", "train_prompts", "gradient_checkpointing")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the weights; adapters are float32 in any case. float16 with lora alone"
    )
    resolution: int | None = Field(None, ge=8, description="Side of the images in pixels; default the model's own")
    guidance: float = Field(
        1.0, ge=1.0, description="Scale of classifier-free guidance, for student and teachers; 1 = without"
    )
    lora: FlowLoRA | None = Field(None, description="Train adapters alone; default all weights")
    train_prompts: bool = Field(False, description="Train the prompt table too; only while a base model is made")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass, for less memory"
    )

    @field_validator("lora")
    @classmethod
    def _wide_enough(cls, value: FlowLoRA | None, info: ValidationInfo) -> FlowLoRA | None:
        if value is None and info.data.get("dtype") == "float16":
            raise ValueError(f"student.dtype {TOO_NARROW}")
        return value

    def build(self, context: Context) -> FlowStudent:
        model = load_flow_model(self, context.device, self.resolution)
        return FlowStudent(model, self, context, read_origin(Path(self.model)))

    def shape(self, notes: list[str]) -> Shape:
        lora = self.lora
        return student_shape(self, self.resolution, notes, lambda m: m if lora is None else with_lora(m, lora))

    @classmethod
    def takes(cls, model: object) -> bool:
        return isinstance(model, FlowModel) or type(model).__module__.startswith("diffusers.pipelines")

    @classmethod
    def weights(cls, model: object) -> Iterator[torch.nn.Parameter]:
        # A pipeline of another kind has no transformer; it is refused where it is built.
        transformer = getattr(model, "transformer", None)
        return iter(() if transformer is None else transformer.parameters())

    def live_student(self, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> FlowStudent:
        return FlowStudent(_live(model, context), self, context)

    @classmethod
    def live_teacher(
        cls, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context
    ) -> LiveFlowTeacher:
        from opd.teachers.flow import FlowTeacher, LiveFlowTeacher

        return LiveFlowTeacher(_live(model, context).requires_grad_(False), FlowTeacher(model=LIVE))


def _live(model: Any, context: Context) -> FlowModel:
    if isinstance(model, FlowModel):
        return model.to(context.device)
    lacking = [name for name in ("transformer", "scheduler", "vae", "encode_prompt") if not hasattr(model, name)]
    if lacking:
        raise ModelError(
            f"a live {type(model).__name__} has no {lacking[0]}; pass a StableDiffusion3Pipeline, or a FlowModel of opd"
        )
    # Refused before it is moved.
    check_parts(model.transformer, model.scheduler.config, None, f"a live {type(model).__name__}")
    model.to(context.device)
    return FlowModel(model.transformer, model.scheduler, TextEncoders(model), model).to(context.device)


class FlowStudent(Student):
    """The built policy. `origin` is what the run that saved it wrote about it, if one did."""

    unit = "steps"
    cheaper = "Lower rollout.steps or student.resolution, or set student.gradient_checkpointing=true"
    library = "diffusers"

    def __init__(
        self, model: FlowModel, settings: FlowTransformer | None, context: Context, origin: dict[str, Any] | None = None
    ):
        self.model, self.context, self.origin = model, context, origin or {}
        self.guidance = 1.0 if settings is None else settings.guidance
        self.noisy = settings is not None and settings.lora is not None and settings.lora.dropout > 0
        if model.base.dtype == torch.float16 and (settings is None or settings.lora is None):
            raise ModelError(f"the live student's dtype {TOO_NARROW}")
        # One that is trained on top of another changes weights that are saved nowhere.
        self.own_base = settings is None or settings.adapter is None
        model.requires_grad_(False)
        model.transformer.requires_grad_(True)
        if settings is not None:
            if settings.lora is not None:
                name = None if settings.model == LIVE else settings.model
                model.transformer = with_lora(model.transformer, settings.lora, name)
            if settings.train_prompts and not isinstance(model.encoder, PromptTable):
                raise ModelError("student.train_prompts is for models with a prompt table, and this one has none")
            model.encoder.requires_grad_(settings.train_prompts)
            if settings.gradient_checkpointing:
                model.base.enable_gradient_checkpointing()
        self.module: torch.nn.Module = model

    def __call__(self, trajectories: Trajectories, context: Context | None = None) -> Gaussian:
        # The wrapper of several processes talks to the others in every pass, and without a gradient they make
        # different numbers of them.
        module = self.module if torch.is_grad_enabled() else self.model
        return believe(module, trajectories, [start.condition for start in trajectories.contexts])

    def agree(self, context: Context, teachers: Sequence[LiveTeacher], end_tokens: Sequence[int] | None) -> Context:
        return context.with_(agreed=Guidance(self.guidance))

    def check_prompts(self, prompts: Sequence[Prompt], limit: int) -> None:
        check_prompts(prompts, self.model.encoder, limit)

    @torch.no_grad()
    def check_outputs(self, trajectories: Trajectories, tolerance: float) -> None:
        """The scheduler of the pipeline must take the same step as the ODE here."""
        first, _ = trajectories.rows(0, 1)
        start, condition = first.contexts[0].start[None], first.contexts[0].condition
        times = self.model.grid(4)
        velocity = self.model(start, times[:1], [condition], [1], [1.0])
        ours = transition(start, velocity, times[:1], times[1:2], torch.zeros_like(times[:1])).mean
        scheduler: Any = type(self.model.scheduler).from_config(self.model.scheduler.config)
        scheduler.set_timesteps(4)
        theirs = scheduler.step(velocity.cpu(), scheduler.timesteps[0], start.cpu(), return_dict=False)[0]
        off = float((ours.cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
        if not off <= max(tolerance, 1e-3):
            raise SelfTestError(
                f"the pipeline's scheduler and the sampler here take steps that differ by {off:.1%}: this scheduler "
                "does not follow the plain flow-matching ODE. Take a FlowMatchEulerDiscreteScheduler"
            )

    def outcomes(self, trajectories: Trajectories) -> list[np.ndarray]:
        latents = torch.stack([context.outcome for context in trajectories.contexts])
        # Few at a time: of each one a decoder of 512 pixels holds tensors of [256, 512, 512].
        return [image for part in latents.split(4) for image in self.model.images(part)]

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """`tokens` are the times of the steps; `image` is a small PNG as a data URI."""
        rows = []
        ends = [0, *trajectories.lengths.cumsum(0).tolist()]
        images = self.outcomes(trajectories)
        for i, context in enumerate(trajectories.contexts):
            prompt, here = trajectories.prompts[i], slice(ends[i], ends[i + 1])
            row = {
                "id": prompt.id,
                "prompt": prompt.view(),
                "completion": "",
                "finished": True,
                "reward": trajectories.reward(i),
                "tokens": labels(context),
                "values": {name: digits(value[here]) for name, value in values.items()},
                "image": data_address(images[i], SHOWN_PIXELS),
            }
            rows.append(row | ({"task": prompt.fields["task"]} if "task" in prompt.fields else {}))
        return rows

    def own_sampler(self, context: Context) -> HeldOutSampler:
        from opd.flow.rollout import FlowRollout, SamplerSettings
        from opd.rollouts import HeldOutSampler

        settings = SamplerSettings()
        return HeldOutSampler(FlowRollout(self.model, settings), settings, context)

    def measured_by(self, sampler: HeldOutSampler, settings: Evaluation) -> HeldOutSampler:
        assert isinstance(settings, evaluation.FlowEvaluation)
        # Without noise it follows the ODE.
        return sampler.changed(steps=settings.steps, noise=0.0)

    def measure(self, run: Measured, at: Moment) -> HeldOut:
        return evaluation.measure(run, self, at)

    def as_teacher(self, settings: SelfTeacher, context: Context) -> SelfFlowTeacher:
        from opd.teachers.flow import SelfFlowTeacher

        if settings.mode == "trust_region":
            raise IncompatibleError(
                "teacher 'self' with mode: trust_region takes a mean of logits, and a flow model has none; take mode: "
                "ema, frozen or live"
            )
        return SelfFlowTeacher(copy.deepcopy(self.model), settings, self.model)

    def unwrap(self, accelerator: Accelerator) -> None:
        super().unwrap(accelerator)
        assert isinstance(self.module, FlowModel)
        self.model = self.module

    def live(self) -> tuple[FlowModel | StableDiffusion3Pipeline, None]:
        return (self.model.eval() if self.model.pipeline is None else self.model.pipeline), None

    def save(self, folder: Path, card: str) -> list[str]:
        """`folder` is a diffusers pipeline, or for a model of pixels its parts; with LoRA the merged weights, and the
        adapter in `folder/adapter` unless the student began with another adapter."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder, adapter=self.own_base)
        try:
            (folder / "README.md").write_text(card, encoding="utf-8")
        except (OSError, ValueError) as error:
            return [f"the model card could not be written ({error})"]
        return []


def with_lora(transformer: torch.nn.Module, lora: FlowLoRA, name: str | None = None) -> PeftModel:
    """The transformer with adapters, which say that they change the model `name`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("student.lora needs peft: pip install 'opd[flow]'") from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        init_lora_weights="gaussian" if lora.initial == "gaussian" else True,
    )
    try:
        adapted: PeftModel = get_peft_model(transformer, config)
    except ValueError as error:
        raise ModelError(f"student.lora.targets {lora.targets!r}: {str(error).splitlines()[0][:160]}") from None
    # peft looks where transformers keeps a model's name, and diffusers keeps it elsewhere.
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted
