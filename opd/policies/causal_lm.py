"""A causal language model as the student: full fine-tuning or LoRA."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from opd.choice import Settings
from opd.context import Context
from opd.distributions import Categorical, Distribution
from opd.environments.base import COLUMNS
from opd.errors import ModelError, RunError, nearest
from opd.files.whole import attempt, told
from opd.language import evaluation
from opd.language.attention import check_attention
from opd.language.dropout import restore, silence
from opd.language.engines.in_process import InProcess
from opd.language.engines.layouts import Layout
from opd.language.engines.transformers import LanguageModel
from opd.language.experts import Experts
from opd.language.lora_targets import adapted, spare_routers
from opd.language.model import ModelSettings, is_own, load_tokenizer
from opd.language.own_outputs import check_logits
from opd.language.saving import (
    check_savable,
    difference,
    difference_of_adapter,
    is_adapted,
    merged,
    quantised_by,
    write_weights,
)
from opd.language.shape import model_shape
from opd.language.student import LanguageStudent
from opd.language.tokens import tokens_of
from opd.merging.adapters import write as write_adapter
from opd.objectives.base import Loss
from opd.planning import Shape
from opd.policies.base import LIVE, Policy
from opd.policies.evaluation import Evaluation
from opd.policies.held_out import HeldOut, Measured, Moment
from opd.prompts import Prompt
from opd.provenance import ORIGIN, read_origin
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from peft import PeftModel

    from opd.rollouts import HeldOutSampler
    from opd.teachers.local import LanguageTeacher
    from opd.teachers.self_teacher import SelfLanguageTeacher, SelfTeacher

IMAGE_TEXT = frozenset(
    name
    for names in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    for name in ([names] if isinstance(names, str) else names)
)
"""Classes of transformers that read pictures too; live ones are students of kind image_text."""


class LoRA(Settings):
    """Low-rank adapters, by `peft`."""

    rank: int = Field(16, ge=1, le=16_384, description="Of the added matrices")
    alpha: int = Field(32, ge=1, description="Their product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Of the adapters' input while training")
    targets: list[str] | str = Field(
        "all-linear",
        description="Modules that get an adapter, as peft names them; all-linear leaves routers of experts out",
    )
    modules_to_save: list[str] = Field(
        [], description="Modules that are trained and saved whole beside the adapters, e.g. [embed_tokens, lm_head]"
    )


class TrainedModel(ModelSettings, Policy):
    """What is said of any student that is a model of transformers which writes tokens."""

    modality: ClassVar[str | None] = "language"
    answers: ClassVar[type[Distribution]] = Categorical
    evaluation: ClassVar[type[Evaluation]] = evaluation.LanguageEvaluation
    of_live: ClassVar[tuple[str, ...]] = ("lora", "freeze", "gradient_checkpointing", "dropout")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="dtype of the weights that the optimiser sees; hardware.precision sets the compute dtype",
    )
    lora: LoRA | None = Field(None, description="Train adapters alone; default all weights")
    freeze: list[str] = Field([], description="Parts of parameter names that stay as they are, e.g. [embed_tokens]")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass, for less memory"
    )
    dropout: Literal["off", "config"] = Field(
        "off",
        description="Of the model itself while training. config: as its configuration says; what is trained is then "
        "not what samples",
    )

    @field_validator("tokenizer")
    @classmethod
    def _of_the_student(cls, value: str | None) -> str | None:
        if is_own(value):
            raise ValueError("'own' is said of a teacher whose tokenizer is not the student's; remove the key here")
        return value

    @abstractmethod
    def load(self, device: torch.device) -> InProcess:
        """The model that the settings name, its adapter kept where one is trained."""

    @abstractmethod
    def reader(self, local_only: bool) -> InProcess:
        """What the model reads with, without its weights."""

    def adapt(self, model: PreTrainedModel, lora: LoRA) -> PeftModel:
        """The model with new adapters."""
        return with_lora(model, lora, self.spared(model))

    def spared(self, model: PreTrainedModel) -> list[str]:
        """Names of modules that get no adapter, where all linear ones do."""
        return []

    def freeze_parts(self, model: torch.nn.Module) -> None:
        """Take out of training what stays as it is."""
        freeze(model, self.freeze)

    def build(self, context: Context) -> CausalLMStudent:
        check_attention(self.attention, "student.attention", context.device)
        folder = Path(self.model)
        beside = folder.parent if folder.name == "adapter" and not (folder / ORIGIN).is_file() else folder
        return CausalLMStudent(self.load(context.device), self, context, read_origin(beside))

    def shape(self, notes: list[str]) -> Shape:
        return model_shape(self, notes, self._adapted)

    def _adapted(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        made = model if self.lora is None else self.adapt(model, self.lora)
        self.freeze_parts(made)
        return made

    def seen(self, prompt: Prompt) -> dict[str, Any]:
        # Of an episode the row's text is its task alone; what is seen depends on where it begins.
        return {name: prompt.fields[name] for name in COLUMNS} if set(COLUMNS) <= prompt.fields.keys() else {}

    @classmethod
    def weights(cls, model: object) -> Iterator[torch.nn.Parameter]:
        assert isinstance(model, torch.nn.Module)
        return iter(model.parameters())


class CausalLM(TrainedModel):
    """Any `AutoModelForCausalLM`."""

    kind: Literal["causal_lm"] = "causal_lm"
    teacher: ClassVar[str] = "local"

    def load(self, device: torch.device) -> LanguageModel:
        return LanguageModel.load(self, device, keep_adapter=self.lora is not None)

    def reader(self, local_only: bool) -> LanguageModel:
        return LanguageModel(None, load_tokenizer(self, local_only), self.template, self.template_options)

    @classmethod
    def takes(cls, model: object) -> bool:
        base = model.get_base_model() if is_adapted(model) and hasattr(model, "get_base_model") else model
        return isinstance(base, PreTrainedModel) and type(base).__name__ not in IMAGE_TEXT

    def live_student(
        self, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context
    ) -> CausalLMStudent:
        return CausalLMStudent(_live(model, tokenizer, context), self, context)

    @classmethod
    def live_teacher(
        cls, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context
    ) -> LanguageTeacher:
        from opd.teachers.local import LanguageTeacher, LocalTeacher

        language = _live(model, tokenizer, context).requires_grad_(False)
        template: Literal["chat", "plain"] = "chat" if language.tokenizer.chat_template else "plain"
        return LanguageTeacher(language, LocalTeacher(model=LIVE, template=template), context.device)


def _live(model: Any, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> LanguageModel:
    if tokenizer is None:
        raise RunError("distill() got a live language model without its tokenizer; pass tokenizer=...")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "a live model has an adapter that transformers loaded into it, and would be saved without its weights; "
            "pass peft.PeftModel.from_pretrained(base, adapter, is_trainable=True), or the base alone with lora"
        )
    if is_adapted(model) and (model.active_peft_config.is_prompt_learning or not hasattr(model, "merge_and_unload")):
        raise ModelError(f"a live model has a {model.active_peft_config.peft_type.value} adapter; opd takes LORA")
    return LanguageModel(model.to(context.device), tokenizer, "chat" if tokenizer.chat_template else "plain")


class CausalLMStudent(LanguageStudent):
    """The built policy. `origin` is what the run that saved it wrote about it, if one did."""

    library = "transformers"
    shards = True

    def __init__(
        self,
        language: InProcess,
        settings: TrainedModel | None,
        context: Context,
        origin: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.language = language
        language.owner = "the student"
        self.context = context
        self.origin = origin or {}
        self.silenced = silence(language.model) if settings is not None and settings.dropout == "off" else []
        if settings is not None and settings.lora is not None:
            if is_adapted(language.model):
                _check_adapter(language.model, settings)
            else:
                language.model = settings.adapt(language.base, settings.lora)
            self.notes.append(adapted(language.model))
        quantised = quantised_by(language.base)
        dropped = settings is not None and bool(settings.drop_layers)
        if quantised is not None:
            _check_quantised(quantised, is_adapted(language.model), dropped)
        self.fits_no_model = dropped and is_adapted(language.model)
        """Whether the adapter belongs to a model that lies nowhere: one with layers dropped."""
        self.noisy = settings is not None and (
            settings.dropout == "config" or (settings.lora is not None and settings.lora.dropout > 0)
        )
        self.experts = Experts(language.base)
        if self.experts.note is not None:
            self.notes.append(self.experts.note)
        if settings is not None:
            settings.freeze_parts(language.model)
        if settings is not None and settings.gradient_checkpointing:
            # Renamed in transformers 5; the first argument is the same.
            base = language.base
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            language.base.enable_input_require_grads()
        self.layout: Layout = "auto"
        """How rows share the passes that have a gradient, unless a call says otherwise."""
        self.module: torch.nn.Module = language

    @property
    def reader(self) -> InProcess:
        return self.language

    def __call__(
        self, trajectories: Trajectories, context: Context | None = None, layout: Layout = "auto"
    ) -> Categorical:
        now = self.facts(context)
        # The wrapper of several processes talks to the others in every pass, and without a gradient they make
        # different numbers of them.
        module = self.module if torch.is_grad_enabled() else self.language
        layout = self.layout if layout == "auto" and torch.is_grad_enabled() else layout
        contexts, completions = trajectories.contexts, trajectories.completions()
        with self.experts.watched(self.language.padding(contexts, completions, layout)):
            hidden = module(contexts, completions, layout)
        head = self.language.head_of(now)
        return Categorical(hidden, head)

    def own_losses(self, share: float) -> list[Loss]:
        return self.experts.losses(share)

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        return self.experts.signals(sum_over_processes)

    def check_outputs(self, trajectories: Trajectories, tolerance: float) -> None:
        check_logits(self.language, trajectories.contexts, trajectories.completions(), "the student")

    def own_sampler(self, context: Context) -> HeldOutSampler:
        from opd.language.rollout import LanguageRollout
        from opd.rollouts import HeldOutSampler
        from opd.rollouts.student import StudentRollout

        settings = StudentRollout()
        return HeldOutSampler(LanguageRollout(self.language, settings, context), settings, context)

    def measure(self, run: Measured, at: Moment) -> HeldOut:
        return evaluation.measure(run, self, at)

    def as_teacher(self, settings: SelfTeacher, context: Context) -> SelfLanguageTeacher:
        from opd.teachers.self_teacher import SelfLanguageTeacher, TrustRegionTeacher

        made = copy.deepcopy(self.language)
        if settings.mode == "trust_region":
            return TrustRegionTeacher(made, copy.deepcopy(self.language), settings, context.device)
        return SelfLanguageTeacher(made, settings, context.device)

    def live(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        # Whoever passed it gets its rates of dropout back.
        restore(self.silenced)
        return self.language.model.eval(), self.language.tokenizer

    def unwrap(self, accelerator: Accelerator) -> None:
        super().unwrap(accelerator)
        assert isinstance(self.module, InProcess)
        self.language = self.module

    def check_savable(self) -> list[str]:
        told, method = check_savable(self.language.base), quantised_by(self.language.base)
        if method is not None:
            told.append(
                f"the student's weights are quantised by {method}: its adapter alone is saved, in student/adapter"
            )
        if self.fits_no_model:
            told.append("student.drop_layers: its adapter alone would fit no model, so the merged model alone is saved")
        return told

    def save(self, folder: Path, card: str) -> list[str]:
        """`folder` loads in plain `transformers`; with LoRA the merged weights, and the adapter in `folder/adapter`. Of
        a quantised model the adapter alone: merging would round its product, and so be another model."""
        model: Any = self.language.model
        problems: list[str] = []
        if not is_adapted(model):
            problems += write_weights(folder, model)
        elif quantised_by(self.language.base) is None:
            lost: list[str] = []
            if not self.fits_no_model:
                lost = attempt("the adapter", lambda: write_adapter(folder / "adapter", model))
            try:
                problems += lost + write_weights(folder, merged(model))
            except (RuntimeError, MemoryError) as error:
                if lost:
                    raise
                problems.append(
                    f"the merged weights could not be made ({told(error)}); adapter/ holds what was trained"
                )
        else:
            write_adapter(folder / "adapter", model)
            card += self._of_adapter()
        problems += attempt("where completions end", lambda: write_end_ids(folder, tokens_of(self.context).end_ids))
        problems += attempt("the tokenizer", lambda: self.language.save_reader(folder))
        return problems + attempt("the model card", lambda: (folder / "README.md").write_text(card, encoding="utf-8"))

    def compare(self, folder: Path) -> str | None:
        model: Any = self.language.model
        if is_adapted(model) and quantised_by(self.language.base) is not None:
            return difference_of_adapter(folder / "adapter", model)
        return difference(folder, model, self.language.probes())

    def _of_adapter(self) -> str:
        name = self.language.base.config.name_or_path
        return (
            f"\nThe student is an adapter of `{name}`, which is quantised; merged weights would be rounded again and "
            "be another model, so there are none here. With transformers and peft:\n\n"
            f'```python\nbase = AutoModelForCausalLM.from_pretrained("{name}")\n'
            'model = PeftModel.from_pretrained(base, "adapter")\n```\n'
        )


def _check_adapter(model: Any, settings: TrainedModel) -> None:
    """Raise `ModelError` where `student.lora` asks for another adapter than the one that goes on being trained."""
    lora, config = settings.lora, model.active_peft_config
    assert lora is not None
    if settings.model == LIVE:
        raise ModelError("student.lora beside a live peft model: it has its adapter already; leave lora out")
    kept = sorted(config.modules_to_save or [])
    for key, wanted, has in (
        ("rank", lora.rank, config.r),
        ("alpha", lora.alpha, config.lora_alpha),
        ("dropout", lora.dropout, config.lora_dropout),
        ("modules_to_save", sorted(lora.modules_to_save), kept),
    ):
        if wanted != has:
            raise ModelError(
                f"student.lora.{key} is {wanted!r}, and the adapter {settings.model} goes on with {has!r}; write that, "
                "or leave student.lora out to merge the adapter and train all weights"
            )
    has = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    if lora.targets == "all-linear":
        base = model.get_base_model()
        head, spared = base.get_output_embeddings(), set(settings.spared(base))
        without = [
            name
            for name, part in base.named_modules()
            if isinstance(part, torch.nn.Linear)
            and part is not head
            and name not in spared
            and not any(mark in name for mark in ("lora_", "base_layer", "modules_to_save", "original_module"))
        ]
        fits = not without
    else:
        fits = (lora.targets if isinstance(lora.targets, str) else sorted(lora.targets)) == has
    if not fits:
        raise ModelError(
            f"student.lora.targets is {lora.targets!r}, and the adapter {settings.model} goes on with {has!r}; "
            "write that"
        )


def _check_quantised(method: str, adapted: bool, dropped: bool) -> None:
    if dropped:
        raise ModelError(
            f"student.drop_layers beside weights quantised by {method}: the adapter that is saved would fit no model; "
            "drop the layers of plain weights"
        )
    if "8 bits" in method:
        raise ModelError(
            f"the student's weights are quantised by {method}, whose products depend on what else is in the batch: "
            "what samples and what trains would not be one model. Take 4 bits, or plain weights"
        )
    if not adapted:
        raise ModelError(
            f"the student's weights are quantised by {method} and cannot be trained; set student.lora to train "
            "adapters beside them, or take plain weights"
        )


def write_end_ids(folder: Path, end_ids: Sequence[int]) -> None:
    """Let a saved model end where the run's completions ended: `eos_token_id` of its `generation_config.json`."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    written = config.get("eos_token_id")
    if end_ids and set(end_ids) != set(written if isinstance(written, list) else [written]):
        config["eos_token_id"] = sorted(end_ids)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def freeze(model: torch.nn.Module, parts: Sequence[str]) -> None:
    """Take parameters out of training by parts of their names; a tied head goes with its embedding."""
    for part in parts:
        found = [p for name, p in model.named_parameters() if part in name]
        if not found:
            names = [name for name, _ in model.named_parameters()]
            raise ModelError(f"student.freeze: no parameter's name holds {part!r}; names look like {names[0]!r}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"student.freeze {list(parts)!r} leaves no parameter to train; name fewer parts"
            if parts
            else "the student has no parameter to train; load a peft model with is_trainable=True"
        )


def with_lora(model: PreTrainedModel, lora: LoRA, without: Sequence[str] = ()) -> PeftModel:
    """A model with new adapters, but for modules whose names are in `without`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("student.lora needs peft: pip install 'opd[lora]'") from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        modules_to_save=lora.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    names = [name for name, _ in model.named_modules() if name]
    for wanted in lora.modules_to_save:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise ModelError(
                f"student.lora.modules_to_save: no module is named {wanted!r}; names look like {names[-1]!r}"
            )
    for wanted in lora.targets if isinstance(lora.targets, list) else ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise ModelError(
                f"student.lora.targets: no module is named {wanted!r}"
                f"{nearest(wanted, {name.rpartition('.')[2] for name in names})}; take names of the model's modules"
            )
    spare_routers(config, model)
    if without:
        config.exclude_modules = [*without, *(config.exclude_modules or ())]
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"student.lora.targets {lora.targets!r}: {str(error).splitlines()[0][:160]}") from None
