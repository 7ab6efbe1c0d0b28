"""Policies: the student, and how it turns trajectories into distributions with a gradient."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedTokenizerBase

from opd.choice import Choice, names_a_place
from opd.context import Context
from opd.distributions import Distribution
from opd.errors import RunError
from opd.planning import Shape
from opd.policies.evaluation import Evaluation
from opd.prompts import Prompt
from opd.schedules import Scheduled
from opd.sharding import fill
from opd.trajectories import Outcome, Trajectories
from opd.weights import copy_into, fingerprint, frozen, trained

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from opd.objectives import Loss
    from opd.policies.held_out import HeldOut, Measured, Moment
    from opd.rollouts import HeldOutSampler
    from opd.teachers import LiveTeacher
    from opd.teachers.self_teacher import SelfTeacher


LIVE = "(passed from Python)"
"""What stands for the name of a model that was passed as an object."""


class Written(Protocol):
    """Who writes a student into a folder, and knows whether what lies there is that student."""

    @property
    def library(self) -> str:
        """What loads the folder, as hubs call it."""

    def save(self, folder: Path, card: str) -> list[str]:
        """As `Student.save`."""

    def compare(self, folder: Path) -> str | None:
        """As `Student.compare`."""


class Student(ABC):
    """A built policy: all that a run has to know of the student's modality. `module` is what the update trains and
    `accelerate` wraps."""

    module: torch.nn.Module
    context: Context
    skeleton: torch.nn.Module | None = None
    """The module's structure without weights, where the update shards them over processes."""

    shards: ClassVar[bool] = False
    """Whether its rollouts and passes work on weights that processes hold together (`opd.sharding.whole`)."""

    noisy: bool = False
    """Whether the recipe asks for noise while training: dropout, of the model or of adapters."""

    unit: ClassVar[str] = "tok"
    """What a person calls a position, for the progress bar."""

    cheaper: ClassVar[str] = "Shorten rollout.max_new_tokens, or set student.gradient_checkpointing=true"
    """What lets one trajectory fit that does not, for the error that says so."""

    library: ClassVar[str]
    """Which library loads what `save` writes, for the model card."""

    @functools.cached_property
    def notes(self) -> list[str]:
        """What a person should know of this student before the run, one sentence each."""
        return []

    @abstractmethod
    def __call__(self, trajectories: Trajectories, context: Context | None = None) -> Distribution:
        """The student's distribution at the N positions of `trajectories`, with a graph when gradients are on.

        `context` has the facts of a step; without one they are those of the run (`facts`).
        """

    def facts(self, context: Context | None) -> Context:
        """What was passed for a step, or what holds at all steps.

        Raises:
            RunError: nothing was passed, and the temperature follows a schedule.
        """
        if context is None and isinstance(self.context.temperature, Scheduled):
            raise RunError("the temperature follows a schedule: pass the student the context of a step (Run.at)")
        return context or self.context

    @abstractmethod
    def agree(self, context: Context, teachers: Sequence[LiveTeacher], end_tokens: Sequence[int] | None) -> Context:
        """Settle what student and teachers must share (vocabulary, end tokens), or raise what does not fit."""

    @abstractmethod
    def check_prompts(self, prompts: Sequence[Prompt], limit: int) -> None:
        """Raise `DataError` for a prompt that cannot be encoded or is longer than `limit`."""

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> list[str]:
        """Warnings about prompts with completions of up to `budget` that are longer than what the model was made for;
        raises `ModelError` where it cannot read them."""
        return []

    def prompt_length(self, prompt: Prompt) -> int | None:
        """Tokens of a prompt as the student reads it; None where that is nothing to count."""
        return None

    @abstractmethod
    def check_outputs(self, trajectories: Trajectories, tolerance: float) -> None:
        """Raise `SelfTestError` when the model's own outputs and those that the loss will be computed from differ by
        more than `tolerance`."""

    def own_losses(self, share: float) -> list[Loss]:
        """What the model itself adds to the loss of the last micro-batch, `share` of all processes' trajectories of a
        step: the auxiliary loss of its routers. Empty for most."""
        return []

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What the model measured of itself since it was asked last, to be logged; every process must ask."""
        return {}

    @abstractmethod
    def outcomes(self, trajectories: Trajectories) -> Sequence[Outcome]:
        """What each of the B trajectories came to, as verifiers read it: a text, an image."""

    def joined(self, rows: list[dict[str, Any]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Rows for logs, with those put together that show one outcome, as the turns of an episode do."""
        return rows

    @abstractmethod
    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """One row a trajectory, as samples.jsonl and rollouts.jsonl hold them, with `values` (`[N]` each) by position.

        A row has `id`, `prompt`, `completion`, `finished`, `reward` (or None), `tokens` (a text for each of T
        positions), `values` (name to T numbers).
        """

    def named(self, ids: torch.Tensor) -> list[str] | None:
        """A text for each of the ids `[N]` that its distributions are over; None where ids say nothing to a person."""
        return None

    @abstractmethod
    def own_sampler(self, context: Context) -> HeldOutSampler:
        """The student's rollouts by the defaults of its kind, for recipes in which others write."""

    @abstractmethod
    def measured_by(self, sampler: HeldOutSampler, settings: Evaluation) -> HeldOutSampler:
        """The rollout's held-out sampler under the recipe's settings for evaluation.

        Raises:
            IncompatibleError: a setting that this sampler does not have.
        """

    @abstractmethod
    def measure(self, run: Measured, at: Moment) -> HeldOut:
        """Held-out metrics and rows at one step, from what `at.sampler` writes and `run.teachers` say of it."""

    @abstractmethod
    def as_teacher(self, settings: SelfTeacher, context: Context) -> LiveTeacher:
        """A frozen copy of the student as it is now, in the form of a teacher."""

    @abstractmethod
    def live(self) -> tuple[torch.nn.Module | DiffusionPipeline, PreTrainedTokenizerBase | None]:
        """`(model, tokenizer)` as its library knows them, for Python; None for what there is not."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What training moves: all weights, or with frozen parts and LoRA the others only."""
        return trained(extract_model_from_parallel(self.module))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        copy_into(self.state_dict(), state, "student")

    def fingerprint(self) -> str:
        """Of the weights that `state_dict` leaves out."""
        return fingerprint(frozen(extract_model_from_parallel(self.module)))

    def unwrap(self, accelerator: Accelerator) -> None:
        """After training: `module` without what `accelerate` put around it. Of sharded weights the main process gets
        the whole, on the CPU; all must call."""
        self.module = accelerator.unwrap_model(self.module)
        if self.skeleton is not None:
            self.module = fill(self.skeleton, self.module, accelerator.is_main_process) or self.module

    def check_savable(self) -> list[str]:
        """What a person should know, before training, of how the student will be saved.

        Raises:
            ModelError: it could not be saved.
        """
        return []

    @abstractmethod
    def save(self, folder: Path, card: str) -> list[str]:
        """Write what the library of the model's kind loads without `opd`, with a model card: the weights first.

        Returns:
            A sentence for each other part that could not be written.

        Raises:
            OSError, SafetensorError: the weights could not be written.
        """

    def compare(self, folder: Path) -> str | None:
        """How what `folder` loads as differs from the live model, in a sentence; None where it does not, or where the
        kind of model knows no such test."""
        return None

    def written_as(self, form: str) -> Written:
        """Who writes the student in a format, one of `Policy.formats`.

        Raises:
            ModelError: the format has no place for it, or who loads it would take it for another model.
        """
        return self


class Policy(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "policy"
    modality: ClassVar[str | None] = None
    teacher: ClassVar[str]
    """Kind of the teacher that is a model like this one."""
    evaluation: ClassVar[type[Evaluation]]
    """What a recipe may say of held-out measurements of students of this kind."""
    formats: ClassVar[tuple[str, ...]] = ()
    """What `opd export --as` writes students of this kind in; empty where there is one format alone."""
    unused: ClassVar[Mapping[str, str]] = {}
    """Keys at the top of a recipe that would change nothing for students of this kind, with the reason."""
    answers: ClassVar[type[Distribution]]
    """Kind of the student's distributions."""
    of_live: ClassVar[tuple[str, ...]]
    """Settings that a live model takes too; the others say how one is loaded."""

    @classmethod
    def shorthand(cls, value: object) -> dict[str, Any] | None:
        """A model's name or place."""
        return {"model": value} if isinstance(value, str) and names_a_place(value) else None

    def readers(self, form: str | None) -> str | None:
        """For a person: in which format a student is written as `form`, one of `formats`, and who loads it."""
        return None

    def misfit(self, part: Choice) -> str | None:
        """Why a choice of a recipe (rollout, teacher, objective, shaping, curriculum) goes with no student of this
        kind, and what to take instead; None where nothing is known against it before models are loaded."""
        return None

    @abstractmethod
    def build(self, context: Context) -> Student:
        """Load the student on to `context.device`."""

    @abstractmethod
    def shape(self, notes: list[str]) -> Shape:
        """What the student takes, without its weights; what a person should know of how that was found goes to
        `notes`."""

    def files(self, prompt: Prompt) -> list[Path]:
        """Files that a row names and that are read as parts of its prompt."""
        return []

    def seen(self, prompt: Prompt) -> dict[str, Any]:
        """Columns that the student sees besides the text of a prompt: two rows with the same text and others of those
        are two prompts."""
        return {}

    @classmethod
    @abstractmethod
    def takes(cls, model: object) -> bool:
        """Whether a live object, passed from Python, is a model of this kind."""

    @classmethod
    @abstractmethod
    def weights(cls, model: object) -> Iterator[torch.nn.Parameter]:
        """Of a live model, those that a student like it trains."""

    @abstractmethod
    def live_student(self, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> Student:
        """The student that a live model is, under these settings; trained in place."""

    @classmethod
    @abstractmethod
    def live_teacher(cls, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> LiveTeacher:
        """The teacher that a live model is."""
