"""Libraries that train the same student on the same prompts, one step at a time, each in its own process.

A contestant is a training run as its library's user would start it. Nothing of a library is edited: its methods are
timed from outside (`Phases`), lengths of completions are forced from outside (`ForcedLengths`), and its own loop is
held after every optimiser step until the next is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

from benchmarks.phases import WHOLE, Phases
from benchmarks.session import LEARNING_RATE, AfterStep, Job, Score, Session
from benchmarks.sizes import ForcedLengths, load

OPD, TRL, TRL_TILED, GKD, FLOOR = "opd", "TRL", "TRL, best tile", "TRL GKD", "floor"
TILES = (128, 512, 2048, 4096)


def forced_sampler(forced: ForcedLengths, joins: bool = True) -> Any:
    """A class of samplers that keep to the lengths; rows wait for whole waves where they shall not join others."""
    from opd.language.engines.base import ids_of
    from opd.language.engines.sampler import Sampler

    class ForcedSampler(Sampler):
        def __init__(self, *arguments, **options):  # type: ignore[no-untyped-def]
            super().__init__(*arguments, **options)
            self.wanted: dict[int, int] = {}
            self.joins = self.joins and joins

        def start(self, contexts, group, budget, seeds):  # type: ignore[no-untyped-def]
            self.wanted |= dict(zip(map(id, contexts), forced.wanted(map(ids_of, contexts)).tolist(), strict=True))
            return super().start(contexts, group, budget, seeds)

        def _distribution(self, state):  # type: ignore[no-untyped-def]
            log_probs, likeliest = super()._distribution(state)
            wanted = torch.tensor([self.wanted[id(state.contexts[i])] for i in state.alive.tolist()])
            return forced.apply(log_probs, wanted.to(state.drawn.device), state.drawn), likeliest

    return ForcedSampler


class OpdSession(Session):
    """`opd` through its own loop, logging as it does by default; no held-out measurements and no checkpoints."""

    def __init__(self, job: Job):
        super().__init__(job)
        from opd.assembly import assemble
        from opd.recipe import parse_recipe
        from opd.reproductions.definition import merged

        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch("opd.language.engines.in_process.Sampler", forced_sampler(self.forced)))
        self.patches.enter_context(mock.patch("opd.loop.Clock", functools.partial(_clock, self.phases)))
        self.directory = Path(self.patches.enter_context(tempfile.TemporaryDirectory()))
        recipe = parse_recipe(merged(self.settings(), job.changes or {}), "the benchmark's recipe")
        made = _made_on_device(recipe, job) if job.size.made else {}
        self.run = assemble(recipe, _held_monitor(self.directory, self._count), **made)
        self.run.course = _in_order(recipe, self.run)

    def settings(self) -> dict[str, Any]:
        """The run's recipe."""
        job, size = self.job, self.job.size
        model = {"template": "plain", "dtype": "float32"}
        passes = size.micro or size.batch * size.group
        return {
            "steps": 10**6,
            "student": {"model": str(self.folder / "student"), **model, "gradient_checkpointing": size.made},
            "teacher": {"model": str(self.folder / "teacher"), **model, "batch": passes},
            "prompts": {"kind": "inline", "prompts": self.prompts},
            "max_prompt_tokens": 4096,
            "end_tokens": self.ends,
            "rollout": {"max_new_tokens": size.longest, "dtype": "auto" if job.precision == "bf16" else "own"},
            "update": {"learning_rate": LEARNING_RATE},
            "batch": {"prompts": size.batch, "group": size.group, "micro": passes},
            "evaluation": {"prompts": {"kind": "inline", "prompts": [{"id": "none", "prompt": self.prompts[0]}]}},
            "tracking": {"trackers": []},
            "checkpoint": {"every": 0},
            "hardware": {"device": job.device, "precision": job.precision, "threads": job.threads},
            "self_test": False,
            "output": str(self.directory),
        }

    def _count(self, signals: Mapping[str, float]) -> bool:
        self.sampled += int(signals["sampled_tokens"])
        return self.after_step()

    def train(self, after_step: AfterStep) -> None:
        from opd.loop import train

        self.after_step = after_step
        with self.patches:
            self.phases.restart()
            train(self.run)

    def trajectories(self, completions: Sequence[Sequence[int]]) -> Any:
        """This process's share of the first step's prompts, each with one of these completions."""
        from opd.language.engines.base import Row
        from opd.language.rollout import pack_rows

        run = self.run
        prompts = run.share(run.course.next(0, {}, None).prompts)
        device = run.context.device
        rows = [
            Row(torch.tensor(y, device=device), torch.zeros(len(y), device=device), finished=True)
            for y in run.share(completions)
        ]
        contexts = [run.student.language.encode(p) for p in prompts]
        return pack_rows(prompts, contexts, 1, rows, "student")

    def score(self, completions: Sequence[Sequence[int]]) -> Score:
        run, trajectories = self.run, self.trajectories(completions)
        now = run.at(run.step)
        objective = now.recipe.objective[0]
        weights = objective.position_weights(trajectories, run.recipe.reduction, run.sum_over_processes)
        with run.accelerator.autocast():
            loss = objective(run.student(trajectories), run.ask(trajectories, now), weights, trajectories)
        run.optimiser.accumulate([loss], last=True)
        score = Score.of(loss.total.detach(), run.student.module.parameters())
        run.optimiser.optimizer.zero_grad()
        return score


def _made_on_device(recipe: Any, job: Job) -> dict[str, Any]:
    """Student and teacher with random weights that never were on a disk."""
    from opd.context import Context
    from opd.language.engines.transformers import LanguageModel
    from opd.policies.causal_lm import CausalLMStudent
    from opd.teachers.local import LanguageTeacher

    device = torch.device(job.device)
    context = Context(device, seed=recipe.seed)
    dtypes = {"student": torch.float32, "teacher": torch.bfloat16}
    student, teacher = (
        LanguageModel(
            load(job.size, name, dtype, job.device), AutoTokenizer.from_pretrained(job.size.folder / name), "plain"
        )
        for name, dtype in dtypes.items()
    )
    teacher.requires_grad_(False)
    return {
        "student": CausalLMStudent(student.eval(), recipe.student, context),
        "teachers": [LanguageTeacher(teacher, recipe.teacher[0], device)],
    }


def _held_monitor(directory: Path, count: Callable[[Mapping[str, float]], bool]) -> Any:
    from opd.monitor import Monitor

    class HeldMonitor(Monitor):
        def begin(self, run):  # type: ignore[no-untyped-def]
            self._progress, self._task = mock.MagicMock(), 0
            return {}

        def after_step(self, run, signals, measurement):  # type: ignore[no-untyped-def]
            found = super().after_step(run, signals, measurement)
            self.stop_requested = not count(signals)
            return found

        def end(self, run):  # type: ignore[no-untyped-def]
            pass

    return HeldMonitor(directory, quiet=True)


def _in_order(recipe: Any, run: Any) -> Any:
    """The prompts in the order that they are written, as the other contestants are told to take them."""
    from opd.curricula.base import Course, Draw
    from opd.prompts import load_prompts

    prompts, per_step = load_prompts(recipe.prompts), recipe.batch.prompts

    class InOrder(Course):
        def next(self, step, signals, asker):  # type: ignore[no-untyped-def]
            first = step * per_step
            return Draw([prompts[i % len(prompts)] for i in range(first, first + per_step)])

    return InOrder()


def _clock(phases: Phases) -> Any:
    from opd.measurement import Clock

    names = {"update": "optimizer"}

    class TimedClock(Clock):
        @contextlib.contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            with super().__call__(phase), phases(names.get(phase, phase)):
                yield

    return TimedClock()


class TrlSession(Session):
    """TRL's `DistillationTrainer`."""

    def __init__(self, job: Job):
        super().__init__(job)
        torch.set_num_threads(job.threads)
        self.directory = tempfile.TemporaryDirectory()
        student, teacher = (self.load(name) for name in ("student", "teacher"))
        for model in (student, teacher):
            model.generation_config.eos_token_id = self.ends
        self._force(student)
        self.trainer = self.make_trainer(student, teacher, self.reader())
        self._time(student, teacher)

    def load(self, name: str) -> Any:
        """The `student` or the `teacher`."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)
        return model.to(self.job.device)

    def reader(self) -> Any:
        """What reads prompts."""
        return AutoTokenizer.from_pretrained(self.folder / "student", padding_side="left")

    def row(self, number: int) -> dict[str, Any]:
        """What the trainer gets of a prompt."""
        return {"prompt": self.prompts[number]}

    def rows(self) -> Any:
        """The set that is trained on."""
        from datasets import Dataset

        numbers = range(len(self.prompts))
        return Dataset.from_list([row for row in map(self.row, numbers) for _ in range(self.job.size.group)])

    @property
    def arguments(self) -> dict[str, Any]:
        """Settings that both trainers share. What is not as shipped: checkpointing off, no saving, prompts in order."""
        return {
            "output_dir": self.directory.name,
            "max_steps": 10**6,
            "per_device_train_batch_size": self.job.size.batch * self.job.size.group,
            "gradient_accumulation_steps": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "bf16": self.job.precision == "bf16",
            "use_cpu": self.job.device == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 0,
        }

    def make_trainer(self, student: Any, teacher: Any, reader: Any) -> Any:
        from trl import DistillationConfig, DistillationTrainer
        from trl.kernels import chunked_divergence

        if self.job.tile is not None:
            chunked_divergence.TOKEN_CHUNK_SIZE = self.job.tile
        return DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(
                **self.arguments,
                max_completion_length=self.job.size.longest,
                beta=1.0,
                temperature=1.0,
                shuffle_dataset=False,
            ),
            train_dataset=self.rows(),
            processing_class=reader,
        )

    def _force(self, student: Any) -> None:
        """Give `student.generate` the schedule of lengths."""
        generate, forced = student.generate, self.forced

        class Lengths(LogitsProcessor):
            def __init__(self, wanted: torch.Tensor, width: int):
                self.wanted, self.width = wanted, width

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                return forced.apply(scores, self.wanted, input_ids.shape[1] - self.width)

        @functools.wraps(generate)
        def scheduled(*args: Any, **kwargs: Any) -> Any:
            ids, mask = (kwargs[name] for name in self.prompt_names)
            wanted = forced.wanted([row[kept.bool()] for row, kept in zip(ids, mask, strict=True)])
            self.sampled += int(wanted.sum())
            wanted = wanted.to(ids.device)
            processor = LogitsProcessorList([Lengths(wanted, ids.shape[1])])
            return generate(*args, **kwargs, logits_processor=processor)

        student.generate = scheduled

    prompt_names = ("input_ids", "attention_mask")

    def _time(self, student: Any, teacher: Any) -> None:
        trainer, phases = self.trainer, self.phases
        hidden_states = trainer._get_last_hidden_state

        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            with phases("student" if model is student else "teacher"):
                return hidden_states(model, *args, **kwargs)

        trainer._get_last_hidden_state = timed
        phases.wrap(trainer, "_generate_and_score_completions", WHOLE)
        self._time_rest()

    def _time_rest(self) -> None:
        self.phases.wrap(self.trainer, "compute_loss", "loss")
        self.phases.wrap(self.trainer.accelerator, "backward", "backward")
        self.phases.wrap(self.trainer.accelerator, "clip_grad_norm_", "optimizer")

    def train(self, after_step: AfterStep) -> None:
        phases = self.phases

        class Hold(TrainerCallback):
            def on_train_begin(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
                phases.wrap(optimizer, "step", "optimizer")
                phases.restart()

            def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
                control.should_training_stop = not after_step()

        self.trainer.add_callback(Hold())
        self.trainer.train()

    def inputs(self, completions: Sequence[Sequence[int]]) -> Any:
        """The batch that the trainer makes itself of the first step's prompts, sampling replaced by `completions`."""
        trainer = self.trainer
        with mock.patch.object(trainer, "_generate_single_turn", return_value=[list(y) for y in completions]):
            rows = [trainer.train_dataset[i * self.job.size.group] for i in range(len(completions))]
            return trainer._generate_and_score_completions(rows)

    def score(self, completions: Sequence[Sequence[int]]) -> Score:
        trainer = self.trainer
        model = trainer.model.train()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, self.inputs(completions))
        trainer.accelerator.backward(loss)
        score = Score.of(loss.detach(), model.parameters())
        model.zero_grad()
        return score


class GkdSession(TrlSession):
    """TRL's older `GKDTrainer`, always on the student's own samples."""

    prompt_names = ("input_ids", "attention_mask")

    def make_trainer(self, student: Any, teacher: Any, reader: Any) -> Any:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        # On-policy it takes nothing but the prompt from a row.
        rows = [
            {"prompt": text, "input_ids": [*prompt, self.ends[0]], "completion_mask": [0] * len(prompt) + [1]}
            for text, prompt in zip(self.prompts, self.forced.by_prompt, strict=True)
        ]
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                **self.arguments,
                max_new_tokens=self.job.size.longest,
                lmbda=1.0,
                beta=1.0,
                temperature=1.0,
                max_length=8192,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=reader,
        )
        trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
        return trainer

    def _time(self, student: Any, teacher: Any) -> None:
        self.phases.wrap(self.trainer, "generate_on_policy_outputs", WHOLE)
        self.phases.wrap(student, "forward", "student")
        self.phases.wrap(teacher, "forward", "teacher")
        self._time_rest()

    def inputs(self, completions: Sequence[Sequence[int]]) -> Any:
        trainer = self.trainer
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(completions))])
        width = max(map(len, completions))
        # As `generate` returns them: prompts padded on the left, completions on the right.
        padded = torch.tensor([[*y, *[self.ends[0]] * (width - len(y))] for y in completions])
        sequences = torch.cat([batch["prompts"], padded], dim=1)
        generator = SimpleNamespace(generate=lambda **kwargs: SimpleNamespace(sequences=sequences))
        made = trainer.generate_on_policy_outputs(generator, batch, trainer.generation_config)
        names = ("input_ids", "attention_mask", "labels")
        return {name: value.to(self.job.device) for name, value in zip(names, made, strict=True)}
