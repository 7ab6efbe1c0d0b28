"""From a recipe to a run: its choices are built and checked against each other before the first step."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from opd import sharding
from opd.checkpoints import Checkpoints
from opd.checkpoints.content import content_of
from opd.checkpoints.resume import identity
from opd.choice import kind_of, nested
from opd.compatibility import Compatibility
from opd.context import Context
from opd.curricula import Curriculum
from opd.engines import RolloutEngine
from opd.errors import DataError, IncompatibleError, RecipeError
from opd.failures import Skips
from opd.hardware import check_device, fast_in_bf16
from opd.kept_weights import KeptWeights
from opd.monitor import Monitor
from opd.now import Now
from opd.objectives import Objective
from opd.policies import Student
from opd.privacy import promises
from opd.prompts import Prompt, load_prompts, split_held_out
from opd.recipe import Recipe, axis_of
from opd.rollouts import PrefixSource, Rollout
from opd.rollouts.base import Combination
from opd.rollouts.teacher import TeacherRollout
from opd.run import Run, held_out_sampler
from opd.same_view import nothing_to_learn
from opd.self_test import PROBE, PROBE_POSITIONS, self_test
from opd.shaping import Shaping
from opd.stopping import Watch
from opd.teachers import LiveTeacher
from opd.trajectories import Author
from opd.updates import Optimiser, Planned
from opd.verifiers import Scorer
from opd.watches import Watch as Watching


def load_data(recipe: Recipe, bad: list[DataError] | None = None) -> tuple[list[Prompt], list[Prompt]]:
    """`(training, held out)` prompts of a recipe, checked; rows that cannot be used are left out where the recipe says
    so, and then put into `bad`."""
    rows = bad if recipe.skip_bad_prompts and bad is not None else list[DataError]()
    if any(source.weight is not None for source in recipe.evaluation.prompts or ()):
        raise RecipeError("evaluation.prompts: 'weight' is for training, held-out prompts are all measured; remove it")
    try:
        prompts = load_prompts(recipe.prompts, rows)
        own = load_prompts(recipe.evaluation.prompts, rows, "evaluation.prompts") if recipe.evaluation.prompts else None
    except DataError:
        if rows and not recipe.skip_bad_prompts:
            raise rows[0] from None
        raise
    if rows and not recipe.skip_bad_prompts:
        raise or_skipped(rows)
    if own is not None:
        return prompts, own
    return split_held_out(prompts, recipe.evaluation.held_out, recipe.seed)


def or_skipped(bad: Sequence[DataError]) -> DataError:
    """The first of rows that cannot be used, with the way to do without all of them."""
    which = "the row" if len(bad) == 1 else f"all {len(bad)} such rows"
    return DataError(f"{bad[0]}; or leave {which} out with skip_bad_prompts=true")


def answers_taken(prompts: Sequence[Prompt]) -> list[str]:
    """A line where rows ended with the model's answer, as those of fine-tuning do."""
    cut = [prompt for prompt in prompts if "response" in prompt.made]
    if not cut:
        return []
    return [
        f"{len(cut)} of {len(prompts)} rows ended with the model's answer ({cut[0].where} is the first): it is no part "
        "of the prompt, and their column 'response'"
    ]


def not_held_out(recipe: Recipe, training: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    """A warning where rows of `evaluation.prompts` are training prompts too."""
    shared = _shared(recipe, training, held_out) if recipe.evaluation.prompts else []
    if not shared:
        return []
    choosing = [
        key
        for key, chosen in (
            ("checkpoint.keep_best", recipe.checkpoint.keep_best),
            ("evaluation.stop", recipe.evaluation.stop),
        )
        if chosen is not None
    ]
    if recipe.update.private and choosing:
        # Who may see the numbers is one thing; a student that was chosen by them is another than the accounted one.
        raise DataError(
            f"evaluation.prompts: {len(shared)} of {len(held_out)} are training prompts too ({shared[0].where} is the "
            f"first), and update {kind_of(recipe.update)!r} does not account for a choice by records, which "
            f"{choosing[0]} makes; take them out, or remove the key"
        )
    if recipe.update.private and "held_out" not in recipe.update.revealed:
        raise DataError(
            f"evaluation.prompts: {len(shared)} of {len(held_out)} are training prompts too ({shared[0].where} is the "
            f"first), and update {kind_of(recipe.update)!r} does not account for measurements on records; take them "
            "out, or set update.reveals=[held_out]"
        )
    return [
        f"evaluation.prompts: {len(shared)} of {len(held_out)} are training prompts too ({shared[0].where} is the "
        "first): measurements on them are not held out; take them out of one of the two sets"
    ]


def trained_on(recipe: Recipe, trained: Recipe, held_out: Sequence[Prompt]) -> list[str]:
    """A warning where a run's student is measured on prompts of its training: of a held-out share that is another than
    the run's, or of another set. `trained`: the recipe that the run wrote down."""
    try:
        training = load_data(trained)[0]
    except DataError as error:
        return [f"whether the run trained on these prompts cannot be told, its own are gone: {error}"]
    if recipe.prompts == trained.prompts and not recipe.evaluation.prompts:
        # Rows of one set, of which two may say the same: only what is drawn otherwise is no longer held out.
        ids = {prompt.id for prompt in training}
        shared = [prompt for prompt in held_out if prompt.id in ids]
        own = f"evaluation.held_out={trained.evaluation.held_out} and seed={trained.seed} as the run did, or "
    else:
        shared, own = _shared(recipe, training, held_out), ""
    if not shared:
        return []
    return [
        f"{len(shared)} of these {len(held_out)} prompts are training prompts of the run ({shared[0].where} is the "
        f"first): figures on them are not held out. Take {own}evaluation.prompts that it did not train on"
    ]


def _shared(recipe: Recipe, training: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[Prompt]:
    """The held-out prompts that are training prompts too: the student sees the same, or a row of the same id holds the
    same."""

    def seen(prompt: Prompt) -> set[str]:
        view = prompt.view()
        messages = [{"role": "user", "content": view}] if isinstance(view, str) else view
        fields = {"prompt": messages, **recipe.student.seen(prompt)}
        rows = (Prompt("", fields, folder=prompt.folder), replace(prompt, column=""))
        return {content_of([row], recipe.student.files) for row in rows}

    trained = {key for prompt in training for key in seen(prompt)}
    return [prompt for prompt in held_out if not trained.isdisjoint(seen(prompt))]


class ChecksPrompts(Protocol):
    """A part that reads prompts."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt that it cannot read."""


def readable(
    recipe: Recipe,
    prompts: list[Prompt],
    bad: list[DataError],
    student: Student | None,
    *parts: ChecksPrompts,
) -> list[Prompt]:
    """The prompts that the student, where it is built, and the other parts can read; another one is an error, or joins
    the `bad` where the recipe skips those."""
    kept = []
    for prompt in prompts:
        try:
            if student is not None:
                student.check_prompts([prompt], recipe.max_prompt_tokens)
            for part in parts:
                part.check_prompts([prompt])
            kept.append(prompt)
        except DataError as error:
            if not recipe.skip_bad_prompts:
                raise or_skipped([error]) from None
            bad.append(error)
    if not kept:
        raise DataError(f"skip_bad_prompts leaves no prompt at all; the last one: {bad[-1]}")
    return kept


def check_verdicts(recipe: Recipe, verifier: Scorer | None, training: Sequence[Prompt]) -> None:
    """Raise `DataError` when a part learns from verdicts and no training prompt can get one; those of a mixture may go
    without."""
    learners: list[Objective | Shaping | Curriculum] = [*recipe.objective, *recipe.shaping, recipe.curriculum]
    for part in learners:
        if part.needs_reward and verifier is not None and not recipe.rollout.rewards:
            verifier.check_verdicts(training, f"{axis_of(part)} {kind_of(part)!r}")


def without_verdict(recipe: Recipe, verifier: Scorer | None, training: Sequence[Prompt]) -> list[str]:
    """A line where a part goes by verdicts and some training prompts have none, as with a tag that no route has."""
    learners: list[Objective | Shaping | Curriculum] = [*recipe.objective, *recipe.shaping, recipe.curriculum]
    by_verdicts = [f"{axis_of(part)} {kind_of(part)!r}" for part in learners if part.needs_reward]
    if verifier is None or recipe.rollout.rewards or not by_verdicts:
        return []
    unjudged = [prompt for prompt in training if not verifier.judges(prompt)]
    if not unjudged:
        return []
    return [
        f"{len(unjudged)} of {len(training)} training prompts have no verdict ({unjudged[0].where} is the first), and "
        f"{by_verdicts[0]} goes by verdicts; one needs {verifier.settings.needs}"
    ]


def written_alike(recipe: Recipe) -> list[str]:
    """Warnings where several trajectories of a prompt are asked for and nothing is drawn, so that they are one."""
    rollout, how = recipe.rollout.alike, "the likeliest token is taken everywhere"
    found = []
    if rollout and recipe.batch.group > 1:
        found.append(
            f"batch.group is {recipe.batch.group}, and the rollout writes the same to a prompt each time, since {how}: "
            "take 1, or let it draw"
        )
    if recipe.evaluation.k > 1 and recipe.evaluation.alike(rollout):
        found.append(
            f"evaluation.k is {recipe.evaluation.k}, and held-out completions of a prompt are all the same, since "
            f"{how}: take 1, or let them be drawn"
        )
    return found


def asked_in_vain(recipe: Recipe) -> list[str]:
    """A line where a recipe has teachers and nothing in it goes by what they say."""
    writers = [part for part in nested([recipe.rollout, *recipe.curriculum.rollouts]) if isinstance(part, Rollout)]
    listens = (
        any(objective.needs_teacher for objective in recipe.objective)
        or any(kind_of(shaping) != "uniform" for shaping in recipe.shaping)
        or any(isinstance(part, TeacherRollout) or getattr(part, "teacher", None) is not None for part in writers)
        or any(isinstance(part, Watching) for part in nested(recipe.rollout))
    )
    # The target of a drafter verifies in any case, and answers then.
    if listens or not any(kind_of(teacher) != "target" for teacher in recipe.teacher):
        return []
    kinds = " and ".join(repr(kind_of(objective)) for objective in recipe.objective)
    return [
        f"no rollout lets the teacher write, and objective {kinds} compares with none: it is there for held-out "
        "measurements alone, and each step asks it all the same. For faster steps leave the key 'teacher' out"
    ]


def check_offsets(recipe: Recipe) -> None:
    """Raise `IncompatibleError` when a shaping makes offsets and an objective has no place for them."""
    moving = [kind_of(shaping) for shaping in recipe.shaping if shaping.makes_offsets]
    for objective in recipe.objective if moving else ():
        if not objective.takes_offsets:
            kind = kind_of(objective)
            raise IncompatibleError(
                f"shaping {moving[0]!r} moves the teacher's log-probability of the action taken, and objective "
                f"{kind!r} has no place for that: take reverse_kl_sampled or lightning, or another shaping"
            )


@dataclass(frozen=True)
class Foreseen:
    """Who will write, as far as a recipe says it: see `Writing`."""

    stale: int
    learners: frozenset[Author] = frozenset({"student"})
    current: bool = True
    draws: bool = True
    drafts: bool = False


def check_ahead(recipe: Recipe) -> None:
    """Raise `IncompatibleError` when rollouts are written from older weights and some part needs the student's own, as
    it is; before anything is loaded or started."""
    behind = max((part.behind for part in nested(recipe.rollout) if isinstance(part, RolloutEngine)), default=0)
    if not behind:
        return
    corrected = any(shaping.corrects for shaping in recipe.shaping)
    for objective in recipe.objective:
        objective.check_trajectories(Foreseen(0 if corrected else behind))
    for shaping in recipe.shaping:
        shaping.check_trajectories(Foreseen(behind), exact=True)


def check_ids(recipe: Recipe, count: int | None) -> None:
    """Raise `IncompatibleError` when a part looks at more ids of a state than the `count` that student and teachers
    have in common, where that is known."""
    parts = [part for value in (recipe.rollout, recipe.shaping, recipe.objective) for part in nested(value)]
    for part in parts:
        if count is not None and isinstance(part, Objective | Compatibility):
            part.check_ids(count)


def is_exact(recipe: Recipe, rollout: PrefixSource) -> bool:
    """Whether at every step actions are drawn from the student's whole distribution."""
    steps = range(recipe.steps) if recipe.rollout.scheduled() else (0,)
    return all(rollout.exact(recipe.rollout.at(step, recipe.steps)) for step in steps)


def _built_for_curriculum(
    recipe: Recipe, rollout: Rollout, context: Context, student: Student, teachers: Sequence[LiveTeacher]
) -> PrefixSource:
    """A rollout that the curriculum will ask for, as it will be built then.

    Raises:
        IncompatibleError: it cannot be, which is told before the first step.
    """
    try:
        return rollout.at(0, recipe.steps).build(context, student, teachers)
    except IncompatibleError as error:
        raise IncompatibleError(f"curriculum {kind_of(recipe.curriculum)!r}: {error}") from None


def check_taught(recipe: Recipe, student: Student, teachers: Sequence[LiveTeacher], context: Context) -> None:
    """Raise `IncompatibleError` where what a built teacher knows does not fit the built student and the agreed
    `context`, or an objective asks for the teacher of its fine-tuning and it is another one."""
    for teacher in teachers:
        teacher.check_student(student, context)
        if any(o.same_teacher and o.teacher in (None, teacher.settings.name) for o in recipe.objective):
            teacher.check_origin(student)


def check_written(recipe: Recipe, rollout: PrefixSource) -> None:
    """Raise `IncompatibleError` where an objective or a shaping is not what it says on what a built rollout writes."""
    written = rollout
    if any(shaping.corrects for shaping in recipe.shaping):
        written = copy.copy(rollout)
        written.stale = 0
    for objective in recipe.objective:
        objective.check_authors(rollout.authors)
        objective.check_trajectories(written)
    exact = is_exact(recipe, rollout)
    for shaping in recipe.shaping:
        shaping.check_trajectories(rollout, exact)


def read_by_all(
    recipe: Recipe,
    prompts: tuple[list[Prompt], list[Prompt]],
    bad: list[DataError],
    context: Context,
    student: Student,
    teachers: Sequence[LiveTeacher],
    rollout: PrefixSource,
) -> tuple[list[Prompt], list[Prompt]]:
    """The `(training, held out)` prompts that all built parts can read, as `readable`.

    Raises:
        DataError: one that some part cannot read, where the recipe does not skip those.
        IncompatibleError: a rollout that the curriculum will ask for cannot be built.
    """
    training, held_out = prompts
    verifiers = [] if recipe.verifier is None else [recipe.verifier]
    for own in recipe.curriculum.rollouts:
        with closing(_built_for_curriculum(recipe, own, context, student, teachers)) as source:
            training = readable(recipe, training, bad, None, source)
    training = readable(recipe, training, bad, student, *teachers, rollout, *verifiers)
    return training, readable(recipe, held_out, bad, student, *teachers, *verifiers)


def check_reduction(recipe: Recipe, optimiser: Optimiser) -> None:
    """Raise `IncompatibleError` when the update divides by trajectories and an objective by tokens."""
    for objective in recipe.objective if optimiser.expected else ():
        if (objective.reduction or recipe.reduction) == "token_mean":
            update, kind = (kind_of(part) for part in (recipe.update, objective))
            raise IncompatibleError(
                f"update {update!r} divides by the trajectories that a step has in expectation, and objective {kind!r} "
                "takes the mean over tokens, whose number is not known before: set reduction=sequence_mean, or "
                "sequence_sum"
            )


def check_lengths(
    recipe: Recipe,
    student: Student,
    teachers: Sequence[LiveTeacher],
    prompts: Sequence[Prompt],
    rollout: PrefixSource | None = None,
) -> list[str]:
    """Warnings about models that were made for less than the longest prompt with the longest completion of a run;
    raises `ModelError` where one cannot read that at all."""
    budget = max(recipe.rollout.longest, recipe.curriculum.longest or 1, recipe.evaluation.longest or 1)
    warnings = student.check_lengths(prompts, budget)
    if rollout is not None:
        rollout.check_lengths(prompts, budget)
    for i, teacher in enumerate(teachers):
        which = f"teacher {i}" if len(teachers) > 1 else "the teacher"
        warnings += teacher.check_lengths(prompts, budget, which)
    return warnings


def make_accelerator(recipe: Recipe) -> Accelerator:
    """`accelerate` for the recipe's device and precision, with its trackers."""
    hardware = recipe.hardware
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    check_device(hardware.device, "hardware.device")
    device = "cuda" if hardware.device == "auto" and torch.cuda.is_available() else hardware.device
    fast = fast_in_bf16("cpu" if device == "auto" else device)
    in_bf16 = hardware.precision == "bf16" or (hardware.precision == "auto" and fast)
    # A second run in one process may ask for another precision.
    AcceleratorState._reset_state()
    set_seed(recipe.seed)
    sharded = sharding.plugin()
    accelerator = Accelerator(
        cpu=hardware.device == "cpu",
        mixed_precision="bf16" if in_bf16 else "no",
        log_with=list(recipe.tracking.trackers) or None,
        project_dir=str(recipe.directory),
        fsdp_plugin=sharded,
    )
    sharding.settle(accelerator, sharded)
    if recipe.batch.prompts % accelerator.num_processes:
        raise RecipeError(
            f"batch.prompts is {recipe.batch.prompts}; make it a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator


def build_models(
    recipe: Recipe,
    device: torch.device,
    *,
    student: Student | None = None,
    teachers: Sequence[LiveTeacher] | None = None,
) -> tuple[Student, list[LiveTeacher], Context]:
    """`(student, teachers, context)`: loaded unless given, and agreed on vocabulary and end tokens."""
    context = Context(device=device, temperature=recipe.temperature, seed=recipe.seed, steps=recipe.steps)
    student = student or recipe.student.build(context)
    built = list(teachers or ())
    with ExitStack() as opened:
        for settings in recipe.teacher if teachers is None else ():
            built.append(settings.build(context, student))
            opened.callback(built[-1].close)
        context = student.agree(context, built, recipe.end_tokens)
        told = [member.common_ids(context) for teacher in built for member in teacher.members().values()]
        counts = [count for count in (context.agreed.count, *told) if count is not None]
        check_ids(recipe, min(counts, default=None))
        opened.pop_all()
    student.context = context
    return student, built, context


def compute_device(recipe: Recipe, accelerator: Accelerator) -> torch.device:
    return accelerator.device if recipe.hardware.device == "auto" else torch.device(recipe.hardware.device)


def assemble(
    recipe: Recipe,
    monitor: Monitor,
    *,
    student: Student | None = None,
    teachers: Sequence[LiveTeacher] | None = None,
    data: tuple[list[Prompt], list[Prompt]] | None = None,
) -> Run:
    """Build every part of a recipe and check that they fit together; nothing is trained yet.

    `student` and `teachers` may be given already built (from Python); otherwise they load here.
    """
    # What was opened for a run that does not come about is closed.
    with ExitStack() as opened:
        run = _assembled(recipe, monitor, opened, student, teachers, data)
        opened.pop_all()
        return run


def _assembled(
    recipe: Recipe,
    monitor: Monitor,
    opened: ExitStack,
    student: Student | None,
    teachers: Sequence[LiveTeacher] | None,
    data: tuple[list[Prompt], list[Prompt]] | None,
) -> Run:
    bad: list[DataError] = []
    check_offsets(recipe)
    check_ahead(recipe)
    if recipe.verifier is not None:
        recipe.verifier.check_machine()
    loaded = training, held_out = data or load_data(recipe, bad)
    accelerator = make_accelerator(recipe)
    student, built, context = build_models(
        recipe, compute_device(recipe, accelerator), student=student, teachers=teachers
    )
    for teacher in built:
        opened.callback(teacher.close)
    check_taught(recipe, student, built, context)
    for warning in [*nothing_to_learn(recipe, student, built), *written_alike(recipe), *asked_in_vain(recipe)]:
        monitor.warn(warning)
    rollout = recipe.rollout.build(context, student, built)
    opened.callback(rollout.close)
    if isinstance(rollout, Combination) and rollout.elsewhere and accelerator.num_processes > 1:
        raise IncompatibleError(
            f"rollout {kind_of(recipe.rollout)!r} has a part with an engine, and its parts get unequal shares in the "
            f"{accelerator.num_processes} processes, which the engine needs all at once: run one process, or make the "
            "part with the engine the whole rollout"
        )
    training, held_out = read_by_all(recipe, (training, held_out), bad, context, student, built, rollout)
    monitor.warn_of_skipped(bad)
    if rollout.elsewhere and 0 < len(held_out) < accelerator.num_processes:
        raise RecipeError(
            f"there are {len(held_out)} held-out prompts, and with rollout.engine each of the "
            f"{accelerator.num_processes} processes measures one or more; name more (evaluation.held_out), or none"
        )
    lengths = check_lengths(recipe, student, built, [*training, *held_out], rollout)
    for note in dict.fromkeys(
        [*student.notes, *(note for teacher in built for note in teacher.notes), *rollout.notes, *lengths]
    ):
        monitor.warn(note)
    check_written(recipe, rollout)
    for objective in recipe.objective:
        for i, teacher in enumerate(built):
            if objective.teacher in (None, teacher.settings.name):
                objective.check_accepts(teacher.answers, f"teacher {i}" if len(built) > 1 else "the teacher")
    for shaping in recipe.shaping:
        shaping.check_teachers(built)
    verifier = None if recipe.verifier is None else recipe.verifier.build(context)
    for note in () if verifier is None else verifier.notes:
        monitor.warn(note)
    check_verdicts(recipe, verifier, training)
    for note in without_verdict(recipe, verifier, training):
        monitor.warn(note)

    now = Now.at(recipe, context, 0)
    sampler = held_out_sampler(student, rollout, now)
    if recipe.self_test:
        probe = random.Random(recipe.seed).sample(training, min(2, len(training)))
        asked = now.request(probe, PROBE_POSITIONS, stream=PROBE, group=1)
        with accelerator.autocast():
            self_test(student, built, rollout, now.recipe.objective, asked, sampler)
        # What the student counted of a tiny rollout is of no step.
        student.own_signals(lambda own: own)
    # Dropout and gradient checkpointing act in training mode alone; rollouts and evaluations leave it for their time.
    student.module.train()

    optimiser = recipe.update.build(student, accelerator)
    check_reduction(recipe, optimiser)
    planned = Planned(
        len(training), recipe.batch.prompts, recipe.steps, recipe.directory, draws_known=recipe.curriculum.known
    )
    for note in optimiser.begin(planned):
        monitor.warn(note)
    for promise in promises.listed(promises.in_summary(recipe.dump())) if recipe.update.private else []:
        monitor.warn(f"it learns from {promise}, which is private too: for a record of both runs the epsilons add up")
    return Run(
        recipe=recipe,
        context=context,
        accelerator=accelerator,
        student=student,
        teachers=built,
        course=recipe.curriculum.build(training, recipe.batch.prompts, context),
        kept=KeptWeights(student),
        rollout=rollout,
        verifier=verifier,
        shaping=[shaping.build(context) for shaping in recipe.shaping],
        optimiser=optimiser,
        held_out=held_out,
        monitor=monitor,
        checkpoints=Checkpoints(recipe.checkpoint, identity(recipe, itertools.chain(*loaded))),
        skips=Skips(recipe.failures),
        watch=Watch(recipe.evaluation),
        micro=recipe.batch.micro,
    )
