"""Completions sampled from a language model, by itself or by an engine; the student's and the teacher's rollouts share
it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from opd.choice import OneOf, Settings
from opd.context import Context
from opd.engines import Pending, RolloutEngine, Writer
from opd.engines.base import NONE_TRAINED
from opd.errors import RunError
from opd.hardware import fast_in_bf16
from opd.language.engines.base import Drawing, EncodedPrompt, Ended, Row, followed_by
from opd.language.engines.in_process import InProcess
from opd.language.own_outputs import TOLERANCE, check_draws, check_written, compute_dtype
from opd.language.watching import SEGMENT, Watching
from opd.planning import Shape
from opd.prompts import Prompt
from opd.rollouts.base import HeldOutSampler, PrefixSource, row_seed
from opd.rollouts.request import Request
from opd.schedules import OverSteps, extremes
from opd.sharding import whole
from opd.trajectories import AUTHORS, Author, Trajectories
from opd.watches import LiveWatch, Watch

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class SamplingSettings(Settings):
    """How completions are drawn."""

    top_p: Annotated[float, OverSteps(gt=0, le=1)] = Field(1.0, description="Keep the most likely tokens of this mass")
    top_k: Annotated[int, OverSteps(ge=0)] = Field(0, description="Keep so many of the most likely tokens; 0 keeps all")
    batch: int = Field(64, ge=1, description="Rows sampled side by side")
    dtype: Literal["own", "bfloat16", "auto"] = Field(
        "own",
        description="Sample from the model's own weights, or from a bfloat16 copy that is renewed at each rollout; "
        "auto: a copy where the device is fast at it. rollout_gap shows what the copy costs in exactness",
    )
    watch: Annotated[Watch, OneOf(Watch)] | None = Field(
        None, description="Who looks at the rows while they are written, and may end some"
    )
    segment: int | None = Field(
        None, ge=1, description=f"Tokens drawn between two looks of the watch; default {SEGMENT}"
    )

    @property
    def alike(self) -> bool:
        """Whether the likeliest token is taken at every step."""
        return extremes(self.top_k) == (1, 1)

    def scorers(self, teachers: Sequence[tuple[str | None, Sequence[Shape]]]) -> Sequence[Shape]:
        """Which models score the rows while they are written, for a plan; see `Watch.scorers`."""
        return () if self.watch is None else self.watch.scorers(teachers)

    @model_validator(mode="after")
    def _looked_at(self) -> Self:
        if self.segment is not None and self.watch is None:
            raise ValueError(
                f"segment is {self.segment}, and without a watch nobody looks between segments; remove the key, or set "
                "watch"
            )
        return self


GREEDY = {"top_p": 1.0, "top_k": 1}
"""Cuts that leave the likeliest token alone."""


class LanguageRollout(PrefixSource[SamplingSettings]):
    """Rollouts of one language model.

    Args:
        language: the model that writes.
        reader: the student's, whose encoding of a prompt the trajectories carry.
        author: who the writer is to the student.
        view: what the writer reads of a prompt (`Teacher.view`); default the student's.
        watch: sees the rows while they are written.
        engine: makes who draws in the place of the model, from the weights that the model would draw from.
        listeners: teachers who are told of every trajectory of training as soon as it is written.

    Attributes:
        writer: whom the engine made.
    """

    def __init__(
        self,
        language: InProcess,
        settings: SamplingSettings,
        context: Context,
        *,
        reader: InProcess | None = None,
        author: Author = "student",
        view: Callable[[Prompt], tuple[Prompt, str | None]] | None = None,
        watch: LiveWatch | None = None,
        engine: RolloutEngine | None = None,
        listeners: Sequence[LiveTeacher] = (),
    ):
        self.language, self.watch, self.listeners = language, watch, listeners
        self.reader, self.author, self.view = reader or language, author, view
        self.authors = frozenset({author})
        own = next(language.parameters()).dtype
        wanted = settings.dtype == "bfloat16" or (settings.dtype == "auto" and fast_in_bf16(context.device))
        self.copy: InProcess | None = None
        if wanted and own != torch.bfloat16:
            self.copy = copy.deepcopy(language).to(torch.bfloat16).requires_grad_(False).eval()
        self.dtype = torch.bfloat16 if self.copy is not None else own
        self.writer: Writer | None = None
        if engine is not None:
            self.writer = writer = engine.build(self.copy or language, context)
            self.dtype, self.stale, self.ahead = writer.dtype, writer.stale, writer.ahead
            self.elsewhere = not engine.here

    def exact(self, settings: SamplingSettings) -> bool:
        return settings.top_p == 1.0 and settings.top_k == 0 and self.author == "student"

    def held_out(self, settings: SamplingSettings, context: Context, student: Student) -> HeldOutSampler:
        """This writer itself, where the student is it, and nobody who watches."""
        if self.author != "student":
            return super().held_out(settings, context, student)
        return HeldOutSampler(self, settings.model_copy(update={"watch": None, "segment": None}), context)

    def writers(self) -> list[PrefixSource]:
        return [self]

    @torch.no_grad()
    def check_draws(self, prompts: Sequence[Prompt], context: Context) -> None:
        training = self.language.training
        self.language.eval()
        # The student's view of a prompt will do: one of the writer's own may be missing where others write.
        contexts = [self.reader.encode(prompt) for prompt in prompts]
        tolerance = max(TOLERANCE[compute_dtype(self.language)], TOLERANCE[self.dtype])
        if self.writer is not None:
            with whole(self.language):
                sample = self.engine().sample
                check_written(sample, self.writer.failures, contexts, self.language, context, tolerance)
        else:
            sampler = self._in_process().sampler(Drawing(context))
            check_draws(sampler, contexts, self.language, f"the {self.author}", tolerance)
        self.language.train(training)

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        if self.writer is not None:
            self.writer.check_lengths(prompts, budget)

    def engine(self) -> InProcess | Writer:
        """What draws: a writer, the model itself, or its copy, which is then renewed."""
        own = self._in_process()
        return own if self.writer is None else self.writer

    def _in_process(self) -> InProcess:
        if self.copy is None:
            return self.language
        for mine, live in zip(self.copy.parameters(), self.language.parameters(), strict=True):
            mine.copy_(live)
        return self.copy

    @torch.no_grad()
    def __call__(self, request: Request[SamplingSettings]) -> Trajectories:
        with whole(self.language):
            return self._sampled(request)

    @torch.no_grad()
    def begin(self, request: Request[SamplingSettings]) -> None:
        if self.writer is None:
            return
        with whole(self.language):
            self.writer.begin(self._asked(request)[1])

    @property
    def notes(self) -> Sequence[str]:
        return () if self.writer is None else self.writer.notes

    def learn(self, settings: SamplingSettings, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        engine = getattr(settings, "engine", None)
        if self.writer is not None and isinstance(engine, RolloutEngine):
            with whole(self.language):
                self.writer.learn(engine, sum_over_processes)

    def beside(self) -> Mapping[str, Callable[[Path], None]]:
        return {} if self.writer is None else self.writer.beside()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.writer is None else self.writer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.load_state_dict(state)
        elif state:
            raise RunError(NONE_TRAINED)

    def failures(self) -> Mapping[str, int]:
        return {} if self.writer is None else self.writer.failures()

    def own_signals(self) -> Mapping[str, float]:
        return {} if self.writer is None else self.writer.own_signals()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _asked(self, request: Request[SamplingSettings]) -> tuple[Sequence[EncodedPrompt], Pending]:
        """The prompts as the writer reads them, and what is asked of it: for rows that go on from something, with that
        behind them."""
        prompts, group, begun, settings = request.prompts, request.group, request.begun, request.settings
        own = [self.language.encode(*((p,) if self.view is None else self.view(p))) for p in prompts]
        views, members = own, group
        if begun is not None:
            # Every trajectory continues its own beginning, so nothing but the prompt is common to a group.
            views = [followed_by(views[i // group], start) for i, start in enumerate(begun)]
            members = 1
        of_rows = [prompt for prompt in prompts for _ in range(group)]
        of = (request.context.seed, request.stream)
        behind = [0] * len(of_rows) if begun is None else [len(start) for start in begun]
        seeds = [row_seed(*of, prompt, group, i % group, behind[i]) for i, prompt in enumerate(of_rows)]
        drawing = Drawing(request.context, settings.top_p, settings.top_k, settings.batch, request.training)
        ended = self._telling(of_rows) if begun is None and request.stream >= 0 else None
        return own, Pending(views, members, request.budget, seeds, drawing, ended)

    def _telling(self, prompts: Sequence[Prompt]) -> Ended | None:
        """What tells the teachers of the rows of these prompts. A row that goes on from another is no trajectory yet,
        and of those that are measured a teacher need not be asked."""
        if not self.listeners:
            return None

        def told(index: int, row: Row) -> None:
            for teacher in self.listeners:
                teacher.expect(prompts[index], row.actions)

        return told

    def _sampled(self, request: Request[SamplingSettings]) -> Trajectories:
        prompts, group = request.prompts, request.group
        own, asked = self._asked(request)
        of_rows = [prompt for prompt in prompts for _ in range(group)]
        watching = self._watching(request, of_rows, [view for view in asked.contexts for _ in range(asked.group)])
        given = (asked.contexts, asked.group, asked.budget, asked.seeds, asked.drawing)
        rows = self.engine().sample(*given, watching, asked.ended)
        if not all(bool(row.log_probs.isfinite().all()) for row in rows):
            raise RunError(
                f"the {self.author}'s distribution over tokens is not a number: its weights left all bounds. Lower "
                "update.learning_rate, or take hardware.precision: fp32"
            )
        same, home = self.reader is self.language and self.view is None, request.context.device
        contexts = own if same else [self.reader.encode(p) for p in prompts]
        # Those of a server come on the CPU.
        rows = [row._replace(actions=row.actions.to(home), log_probs=row.log_probs.to(home)) for row in rows]
        trajectories = pack_rows(prompts, contexts, group, rows, self.author)
        if watching is None:
            return trajectories
        return watching.kept(replace(trajectories, stopped=[row.stopped for row in rows]))

    def _watching(
        self, request: Request[SamplingSettings], prompts: Sequence[Prompt], contexts: Sequence[EncodedPrompt]
    ) -> Watching | None:
        settings = request.settings
        if self.watch is None or settings.watch is None:
            return None
        starts = [torch.zeros(0, dtype=torch.int64)] * len(prompts) if request.begun is None else request.begun
        segment = settings.segment or SEGMENT
        return Watching(self.watch, settings.watch, request.context, segment, prompts, contexts, starts)


def pack_rows(
    prompts: Sequence[Prompt],
    contexts: Sequence[EncodedPrompt],
    group: int,
    rows: Sequence[Row],
    author: Author,
) -> Trajectories:
    """Trajectories of P prompts from P * group rows."""
    actions = torch.cat([row.actions for row in rows])
    lost = torch.tensor([row.lost for row in rows], dtype=torch.bool)
    return Trajectories(
        prompts=[p for p in prompts for _ in range(group)],
        contexts=[c for c in contexts for _ in range(group)],
        actions=actions,
        lengths=torch.tensor([len(row.actions) for row in rows]),
        behaviour_log_probs=torch.cat([row.log_probs for row in rows]),
        finished=torch.tensor([row.finished for row in rows]),
        learn=torch.ones_like(actions, dtype=torch.bool),
        authors=torch.full_like(actions, AUTHORS.index(author), dtype=torch.uint8),
        groups=torch.arange(len(prompts)).repeat_interleave(group),
        lost=lost if bool(lost.any()) else None,
    )
