"""A policy over action tokens as the student: what a vision-language-action model is to this library."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from opd.acting import evaluation
from opd.acting.agreement import Actions
from opd.acting.deciding import PolicyActor, states_of
from opd.acting.model import ActionModel, PolicySettings, load_policy
from opd.acting.outline import policy_shape
from opd.context import Context
from opd.distributions import Categorical, Distribution
from opd.environments.base import COLUMNS
from opd.errors import DataError, IncompatibleError, ModelError, SelfTestError
from opd.language.own_outputs import compute_dtype
from opd.pictures import data_address
from opd.planning import Shape
from opd.policies.base import LIVE, Policy, Student
from opd.policies.evaluation import Evaluation
from opd.policies.held_out import HeldOut, Measured, Moment
from opd.prompts import Prompt
from opd.provenance import read_origin
from opd.trajectories import Trajectories
from opd.weights import fingerprint

if TYPE_CHECKING:
    from opd.rollouts import HeldOutSampler
    from opd.teachers import LiveTeacher
    from opd.teachers.policy import LivePolicyTeacher, SelfPolicyTeacher
    from opd.teachers.self_teacher import SelfTeacher

SHOWN_PIXELS, SHOWN_FRAMES = 96, 48
"""Side of the pictures that logs keep, and how many of an episode, at most."""


class ActionTokensPolicy(PolicySettings, Policy):
    """Pictures, an instruction and numbers of the body in; a chunk of H actions of A numbers out, each one of K tokens,
    all in one pass (OpenVLA-OFT's layout). Every weight is trained."""

    kind: Literal["action_tokens"] = "action_tokens"
    modality: ClassVar[str | None] = "action"
    teacher: ClassVar[str] = "policy"
    answers: ClassVar[type[Distribution]] = Categorical
    evaluation: ClassVar[type[Evaluation]] = evaluation.ActionEvaluation
    unused: ClassVar[Mapping[str, str]] = {"end_tokens": "an episode ends in its environment, not by a token"}
    of_live: ClassVar[tuple[str, ...]] = ("freeze_vision", "gradient_checkpointing")
    freeze_vision: bool = Field(False, description="Leave the part that reads pictures as it is")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass, for less memory"
    )

    def build(self, context: Context) -> ActionStudent:
        return ActionStudent(load_policy(self, context.device), self, context, read_origin(Path(self.model)))

    def shape(self, notes: list[str]) -> Shape:
        return policy_shape(self, notes, frozen=("vision.",) if self.freeze_vision else ())

    def seen(self, prompt: Prompt) -> dict[str, Any]:
        return {name: prompt.fields[name] for name in COLUMNS if name in prompt.fields}

    @classmethod
    def takes(cls, model: object) -> bool:
        return isinstance(model, ActionModel)

    @classmethod
    def weights(cls, model: object) -> Iterator[torch.nn.Parameter]:
        assert isinstance(model, ActionModel)
        return model.parameters()

    def live_student(self, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> ActionStudent:
        assert isinstance(model, ActionModel)
        return ActionStudent(model.to(context.device), self, context)

    @classmethod
    def live_teacher(
        cls, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context
    ) -> LivePolicyTeacher:
        from opd.teachers.policy import LivePolicyTeacher, PolicyTeacher

        assert isinstance(model, ActionModel)
        return LivePolicyTeacher(model.to(context.device).requires_grad_(False), PolicyTeacher(model=LIVE))


class ActionStudent(Student):
    """The built policy. `origin` is what the run that saved it wrote about it, if one did."""

    cheaper = "Lower rollout.decisions, or set student.gradient_checkpointing=true"
    library = "opd"

    def __init__(
        self,
        model: ActionModel,
        settings: ActionTokensPolicy,
        context: Context,
        origin: dict[str, Any] | None = None,
    ):
        self.model, self.context, self.origin = model, context, origin or {}
        model.requires_grad_(True)
        if settings.freeze_vision:
            if model.vision is None:
                raise ModelError("student.freeze_vision is for policies that see pictures, and this one sees none")
            model.vision.requires_grad_(False)
        if settings.gradient_checkpointing:
            model.backbone.gradient_checkpointing_enable()
        self.module: torch.nn.Module = model

    @property
    def actor(self) -> PolicyActor:
        # The wrapper of several processes talks to the others in every pass, and without a gradient they make
        # different numbers of them.
        return PolicyActor(self.model, self.module if torch.is_grad_enabled() else self.model)

    def __call__(self, trajectories: Trajectories, context: Context | None = None) -> Categorical:
        return self.actor.believe(states_of(trajectories.contexts), float(self.facts(context).temperature))

    def agree(self, context: Context, teachers: Sequence[LiveTeacher], end_tokens: Sequence[int] | None) -> Context:
        own = self.model.vocabulary
        for i, teacher in enumerate(teachers):
            theirs = teacher.vocabulary
            if theirs is not None and theirs != own:
                raise IncompatibleError(
                    f"the student's actions are {own} and those of teacher {i} {theirs}; use a teacher with the "
                    "student's bins and vocabulary"
                )
        return context.with_(agreed=Actions(own))

    def check_prompts(self, prompts: Sequence[Prompt], limit: int) -> None:
        from opd.rollouts.simulator import check_body

        unknown = self.model.tokenizer.unk_token_id
        for prompt in prompts:
            text = prompt.view()
            if not isinstance(text, str):
                raise DataError(f"{prompt.where}: the instruction is a list of messages; a policy reads plain text")
            words = self.model.words(text)
            if not words or len(words) > limit:
                raise DataError(
                    f"{prompt.where}: the instruction has {len(words)} tokens; 1 to {limit} are taken "
                    "(max_prompt_tokens)"
                )
            if unknown is not None and unknown in words:
                raise DataError(
                    f"{prompt.where}: the policy's tokenizer does not know a word of {text!r}; make the policy with "
                    "the words of this environment (opd create-policy)"
                )
            if "environment" in prompt.fields:
                check_body(self.model.layout, prompt)

    @torch.no_grad()
    def check_outputs(self, trajectories: Trajectories, tolerance: float) -> None:
        """States of a batch must get what each gets alone, over the actions as over all ids."""
        states = states_of(trajectories.contexts)[:4]
        if not states:
            return
        together = self.actor.believe(states, 1.0).log_probs()
        alone = torch.cat([PolicyActor(self.model).believe([state], 1.0).hidden for state in states])
        whole = self.model.lm_head(alone.to(self.model.lm_head.weight.dtype)).float()
        own = whole[:, list(self.model.layout.actions.ids)].log_softmax(-1)
        gap = float((together - own).abs().mean())
        if not gap <= tolerance:
            raise SelfTestError(
                f"states of one batch differ by {gap:.2g} nats from the same states alone (tolerance {tolerance:g}, "
                f"{compute_dtype(self.module)}): the policy's attention mixes them"
            )

    def outcomes(self, trajectories: Trajectories) -> list[str]:
        return [told(episode.outcome, episode.steps) for episode in trajectories.contexts]

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """`tokens` are the values of the actions, scaled to -1..1; `episode` is what the report plays."""
        layout = self.model.layout
        ends = [0, *trajectories.lengths.cumsum(0).tolist()]
        experts = values.get("expert")
        values = {name: value for name, value in values.items() if name != "expert"}
        rows = []
        for i, episode in enumerate(trajectories.contexts):
            prompt, here = trajectories.prompts[i], slice(ends[i], ends[i + 1])
            taken = layout.actions.decode(trajectories.actions[here].cpu().numpy())
            row: dict[str, Any] = {
                "id": prompt.id,
                "prompt": prompt.view(),
                "completion": told(episode.outcome, episode.steps),
                "finished": bool(trajectories.finished[i]),
                "reward": trajectories.reward(i),
                "tokens": [f"{value:+.2f}" for value in taken.tolist()],
                "values": {name: [round(v, 4) for v in value[here].tolist()] for name, value in values.items()},
                "episode": {
                    "chunk": layout.chunk,
                    "dimensions": layout.dimensions,
                    "steps": episode.steps,
                    "success": bool(episode.outcome == 1),
                    "frames": shown(episode.frames),
                },
            }
            if experts is not None:
                wanted = layout.actions.decode(experts[here].cpu().numpy())
                row["episode"]["expert"] = [round(value, 2) for value in wanted.tolist()]
            rows.append(row | ({"task": prompt.fields["task"]} if "task" in prompt.fields else {}))
        return rows

    def own_sampler(self, context: Context) -> HeldOutSampler:
        from opd.rollouts import HeldOutSampler
        from opd.rollouts.simulator import PlayingSettings, Simulator

        settings = PlayingSettings()
        source = Simulator(PolicyActor(self.model), self.model.layout, settings, plans=True)
        return HeldOutSampler(source, settings, context)

    def measured_by(self, sampler: HeldOutSampler, settings: Evaluation) -> HeldOutSampler:
        assert isinstance(settings, evaluation.ActionEvaluation)
        return sampler.changed(greedy=settings.greedy, frames=settings.frames)

    def measure(self, run: Measured, at: Moment) -> HeldOut:
        return evaluation.measure(run, self, at)

    def as_teacher(self, settings: SelfTeacher, context: Context) -> SelfPolicyTeacher:
        from opd.teachers.policy import SelfPolicyTeacher

        if settings.mode == "trust_region":
            raise IncompatibleError(
                "teacher 'self' with mode: trust_region is for language models; take mode: ema, frozen or live"
            )
        return SelfPolicyTeacher(copy.deepcopy(self.model), settings)

    def unwrap(self, accelerator: Accelerator) -> None:
        super().unwrap(accelerator)
        assert isinstance(self.module, ActionModel)
        self.model = self.module

    def live(self) -> tuple[torch.nn.Module, PreTrainedTokenizerBase | None]:
        return self.model.eval(), self.model.tokenizer

    def save(self, folder: Path, card: str) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder)
        try:
            (folder / "README.md").write_text(card, encoding="utf-8")
        except (OSError, ValueError) as error:
            return [f"the model card could not be written ({error})"]
        return []

    def compare(self, folder: Path) -> str | None:
        saved = load_policy(PolicySettings(model=str(folder), dtype="auto"), "cpu")
        own, theirs = (fingerprint(m.to("cpu", torch.float32).named_parameters()) for m in (self._copy(), saved))
        return None if own == theirs else f"{folder} has other weights than the trained policy"

    def _copy(self) -> ActionModel:
        return copy.deepcopy(self.model)


def told(outcome: float, steps: int) -> str:
    """An episode's outcome in words."""
    if outcome != outcome:
        return f"{steps} steps"
    return f"{'success' if outcome == 1 else 'no success'} in {steps} steps"


def shown(frames: np.ndarray | None) -> list[str]:
    """Addresses of at most `SHOWN_FRAMES` pictures of an episode, the first and the last among them."""
    if frames is None or not len(frames):
        return []
    count = min(len(frames), SHOWN_FRAMES)
    places = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return [data_address(frames[place], SHOWN_PIXELS) for place in places]
