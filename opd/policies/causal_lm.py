"""A causal language model as the student: full fine-tuning or LoRA."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.choice import Settings
from opd.context import Context
from opd.distributions import Categorical
from opd.errors import DataError, IncompatibleError, ModelError, RunError, SelfTestError
from opd.language.agreement import agree_on_end, check_tokenizers, common_vocabulary
from opd.language.model import LanguageModel, ModelSettings
from opd.policies.base import LIVE, Policy, Student
from opd.prompts import Prompt
from opd.provenance import read_origin
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.evaluation import HeldOut
    from opd.language.rollout import LanguageRollout
    from opd.recipe import Recipe
    from opd.rollouts import PrefixSource
    from opd.run import Run
    from opd.teachers import Teacher
    from opd.teachers.local import LanguageTeacher
    from opd.teachers.self_teacher import SelfLanguageTeacher


class LoRA(Settings):
    """Low-rank adapters, by `peft`."""

    rank: int = Field(16, ge=1, le=16_384, description="Of the added matrices")
    alpha: int = Field(32, ge=1, description="Their product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Of the adapters' input while training")
    targets: list[str] | str = Field("all-linear", description="Modules that get an adapter, as peft names them")


class CausalLM(ModelSettings, Policy):
    """Any `AutoModelForCausalLM`."""

    kind: Literal["causal_lm"] = "causal_lm"
    modality: ClassVar[str | None] = "language"
    teacher: ClassVar[str] = "local"
    of_live: ClassVar[tuple[str, ...]] = ("lora", "freeze", "gradient_checkpointing")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="dtype of the weights that the optimiser sees; hardware.precision sets the compute dtype",
    )
    lora: LoRA | None = Field(None, description="Train adapters alone; default all weights")
    freeze: list[str] = Field([], description="Parts of parameter names that stay as they are, e.g. [embed_tokens]")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass, for less memory"
    )

    def build(self, context: Context) -> CausalLMStudent:
        language = LanguageModel.load(self, context.device)
        return CausalLMStudent(language, self, context, read_origin(Path(self.model)))

    @classmethod
    def takes(cls, model: Any) -> bool:
        return isinstance(model, PreTrainedModel)

    @classmethod
    def weights(cls, model: Any) -> Iterator[torch.nn.Parameter]:
        return iter(model.parameters())

    def live_student(self, model: Any, tokenizer: Any, context: Context) -> CausalLMStudent:
        return CausalLMStudent(_live(model, tokenizer, context), self, context)

    @classmethod
    def live_teacher(cls, model: Any, tokenizer: Any, context: Context) -> LanguageTeacher:
        from opd.teachers.local import LanguageTeacher, LocalTeacher

        language = _live(model.eval().requires_grad_(False), tokenizer, context)
        template: Literal["chat", "plain"] = "chat" if tokenizer.chat_template else "plain"
        return LanguageTeacher(language, LocalTeacher(model=LIVE, template=template), context.device, context)


def _live(model: Any, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> LanguageModel:
    if tokenizer is None:
        raise RunError("distill() got a live language model without its tokenizer; pass tokenizer=...")
    return LanguageModel(model.to(context.device), tokenizer, "chat" if tokenizer.chat_template else "plain")


class CausalLMStudent(Student):
    """The built policy. `origin` is what the run that saved it wrote about it, if one did."""

    library = "transformers"
    shards = True

    def __init__(
        self,
        language: LanguageModel,
        settings: CausalLM | None,
        context: Context,
        origin: dict[str, Any] | None = None,
    ):
        self.language = language
        self.context = context
        self.origin = origin or {}
        if settings is not None and settings.lora is not None:
            language.model = _with_lora(language.model, settings.lora)
        if settings is not None:
            freeze(language.model, settings.freeze)
        if settings is not None and settings.gradient_checkpointing:
            # Renamed in transformers 5; the first argument is the same.
            base = language.base
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            language.base.enable_input_require_grads()
        self.module: torch.nn.Module = language
        self.texts: dict[int, str] = {}
        """What each id reads as, alone, as far as anyone has asked: measuring asks for every token and alternative."""

    def __call__(
        self, trajectories: Trajectories, layout: Literal["auto", "packed", "right", "left"] = "auto"
    ) -> Categorical:
        # The wrapper of several processes talks to the others in every pass, and without a gradient they make
        # different numbers of them.
        module = self.module if torch.is_grad_enabled() else self.language
        hidden = module(trajectories.contexts, trajectories.completions(), layout)
        return Categorical(hidden, self.language.head(self.context.temperature, self.context.vocabulary))

    def agree(self, context: Context, teachers: Sequence[Any], end_tokens: Sequence[int] | None) -> Context:
        members = [
            (
                (f"teacher {i}" if len(teachers) > 1 else "the teacher") + (f" of route {route!r}" if route else ""),
                member,
            )
            for i, t in enumerate(teachers)
            for route, member in t.members().items()
        ]
        others = [(which, member.language) for which, member in members if hasattr(member, "language")]
        for which, other in others:
            check_tokenizers(self.language, other, which)
        models = [self.language, *(other for _, other in others)]
        fixed = [member.vocabulary for _, member in members if member.vocabulary is not None]
        if unknown := [i for i in end_tokens or () if i >= common_vocabulary(models)]:
            raise IncompatibleError(
                f"end_tokens names {unknown[0]}, and no model has an id beyond {common_vocabulary(models) - 1}: no "
                "completion would end. Take ids of the student's tokenizer"
            )
        return context.with_(
            vocabulary=min([common_vocabulary(models), *fixed]),
            end_ids=agree_on_end(self.language, others, end_tokens),
        )

    def check_prompts(self, prompts: Sequence[Prompt], limit: int) -> None:
        tokenizer = self.language.tokenizer
        # Some tokenizers name the end token as the unknown one.
        unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
        for prompt in prompts:
            ids = self.language.encode(prompt)
            length = len(ids)
            if unknown is not None and bool((ids == unknown).any()):
                raise DataError(
                    f"{prompt.where}: the student's tokenizer has no token for a part of {str(prompt.view())[:60]!r}; "
                    "take a student whose tokenizer was made for this data"
                )
            if length > limit:
                raise DataError(
                    f"{prompt.where}: the prompt has {length} tokens, more than max_prompt_tokens={limit}; "
                    "shorten it or raise the limit"
                )

    @torch.no_grad()
    def check_outputs(self, trajectories: Trajectories, tolerance: float) -> None:
        part, _ = trajectories.rows(0, 1)
        distribution = self(part)
        ids = torch.cat([part.contexts[0].to(self.language.device), part.actions])[None, :-1]
        own = self.language.base(input_ids=ids).logits[0, -len(distribution) :].float()
        head = replace(distribution.head, temperature=1.0)
        ours = head.logits(distribution.hidden)
        own = own[:, : ours.shape[1]]
        off = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if off > max(tolerance, 1e-3):
            raise SelfTestError(
                f"the model's own logits and its hidden states times its head differ by {off:.1%}: this architecture "
                "changes its logits in a way that opd does not know. If you are sure it is right, set self_test: false"
            )

    def decode(self, actions: torch.Tensor) -> str:
        """A completion as a person reads it."""
        return self.language.decode(actions)

    def outcomes(self, trajectories: Trajectories) -> list[Any]:
        return [self.decode(actions) for actions in trajectories.completions()]

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """`tokens` are the completion's; held-out rows add `alternatives` (`student` and `teacher`: for each token
        `[text, probability]` pairs)."""
        rows = []
        start = 0
        for i, actions in enumerate(trajectories.completions()):
            here = slice(start, start + len(actions))
            start = here.stop
            row = {
                "id": trajectories.prompts[i].id,
                "prompt": trajectories.prompts[i].view(),
                "completion": self.decode(actions),
                "finished": bool(trajectories.finished[i]),
                "reward": trajectories.reward(i),
                "tokens": self.tokens(actions),
                "values": {name: [round(v, 4) for v in value[here].tolist()] for name, value in values.items()},
            }
            rows.append(row)
        return rows

    def held_out_sampler(self, recipe: Recipe, rollout: PrefixSource, context: Context) -> LanguageRollout:
        from opd.language.rollout import LanguageRollout
        from opd.rollouts.student import StudentRollout

        settings = recipe.rollout if isinstance(recipe.rollout, StudentRollout) else StudentRollout()
        if not isinstance(recipe.rollout, StudentRollout):
            rollout = settings.build(context, self, ())
        assert isinstance(rollout, LanguageRollout)
        wanted = recipe.evaluation
        return rollout.drawing(
            wanted.temperature,
            settings.top_p if wanted.top_p is None else wanted.top_p,
            settings.top_k if wanted.top_k is None else wanted.top_k,
        )

    def measure(self, run: Run) -> HeldOut:
        from opd.language.evaluation import measure

        return measure(run, self)

    def as_teacher(self, settings: Teacher, context: Context) -> SelfLanguageTeacher:
        from opd.teachers.self_teacher import SelfLanguageTeacher

        return SelfLanguageTeacher(copy.deepcopy(self.language), settings, context.device, context)

    def live(self) -> tuple[Any, Any]:
        return self.language.model.eval(), self.language.tokenizer

    def tokens(self, actions: torch.Tensor) -> list[str]:
        """Each token as a person reads it, alone."""
        ids = actions.tolist()
        for i in set(ids) - self.texts.keys():
            self.texts[i] = str(self.language.tokenizer.decode([i]))
        return [self.texts[i] for i in ids]

    def unwrap(self, accelerator: Any) -> None:
        super().unwrap(accelerator)
        assert isinstance(self.module, LanguageModel)
        self.language = self.module

    def save(self, folder: Path, card: str) -> None:
        """`folder` loads in plain `transformers`; with LoRA the merged weights, and the adapter in `folder/adapter`."""
        model: Any = self.language.model
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(folder / "adapter")
            merged = _merged_copy(model)
            merged.save_pretrained(folder)
        else:
            model.save_pretrained(folder)
        self.language.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def freeze(model: Any, parts: Sequence[str]) -> None:
    """Take parameters out of training by parts of their names; a tied head goes with its embedding."""
    for part in parts:
        found = [p for name, p in model.named_parameters() if part in name]
        if not found:
            names = [name for name, _ in model.named_parameters()]
            raise ModelError(f"student.freeze: no parameter's name holds {part!r}; names look like {names[0]!r}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"student.freeze {list(parts)!r} leaves no parameter to train; name fewer parts")


def _with_lora(model: Any, lora: LoRA) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("student.lora needs peft: pip install 'opd[lora]'") from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"student.lora.targets {lora.targets!r}: {str(error).splitlines()[0][:160]}") from None


def _merged_copy(model: Any) -> Any:
    """The base model with the adapters folded in; the training copy is left as it is."""
    return copy.deepcopy(model).merge_and_unload()
