"""The one verb: `distill`, from Python with strings or live objects, and from a recipe."""

from __future__ import annotations

import errno
import itertools
import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opd.assembly import answers_taken, assemble, check_ahead, load_data, not_held_out, trained_on
from opd.callbacks import Callback, Callbacks
from opd.checkpoints.directory import clear, must_clear, refuse_links, refuse_occupied, refuse_place
from opd.checkpoints.fitting import misfit
from opd.checkpoints.left import tell_what_is_left
from opd.checkpoints.resume import changes, identity, newest, refuse_changes
from opd.checkpoints.self_teachers import device_of, self_teachers
from opd.checkpoints.store import folder_of, read, steps_stored, verify
from opd.choice import Choice, choices_of, kind_of
from opd.context import Context
from opd.errors import FORCE_CHANGED, OVERWRITE, RESUME, DataError, RecipeError, RunError
from opd.evaluation import evaluate
from opd.files.ours import foreign, listed, refuse_taken
from opd.files.places import DIRECTORY, anchored, elsewhere
from opd.files.run_directory import read_json
from opd.files.whole import locked, main_process, whole_folder, write_whole
from opd.hub import check_push, push
from opd.loop import train
from opd.model_card import card
from opd.monitor import Monitor
from opd.policies import LIVE, Policy, Student
from opd.policies.held_out import HeldOut
from opd.privacy import promises
from opd.privacy.spending import FILE as ACCOUNT
from opd.progress import without_library_bars
from opd.prompts import Prompt, Prompts
from opd.prompts.dataset import encoded_images
from opd.provenance import (
    ORIGIN,
    different_prompts,
    environment,
    held_out_told,
    peak_memory_bytes,
    size_of,
    student_of,
    write_origin,
)
from opd.recipe import Recipe, load_recipe, parse_recipe
from opd.recipe.private import check_live_trackers
from opd.remote.launch import FOLDER, servers_of, started
from opd.run import Run
from opd.saving import save_run
from opd.stopping import best_of
from opd.teachers import LiveTeacher
from opd.trackers import check_trackers

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        student: the trained model (a transformers model, or a peft model with LoRA), in eval mode; of a flow model the
            diffusers pipeline, or its parts; after sharded training (FSDP2) whole in the main process and a shard in
            the others.
        tokenizer: its tokenizer, where it has one.
        directory: run directory: recipe.yaml, environment.json, metrics.jsonl, samples.jsonl, student/, summary.json.
        before: held-out metrics of the student as it began.
        after: the same of the trained student.
        history: every logged record, in order.
        summary: what summary.json holds. The student is that of the last step; with `checkpoint.keep_best` or
            `evaluation.stop`, `best` says which step's was measured to be the best: `metric`, `value`, `step`, and
            whether its checkpoint is `stored`, for `opd export --step`.
        samples: `(before, after)` held-out rows for the same prompts, dicts with `prompt`, `completion` and more.
        items: after training, `accuracy` and `greedy_accuracy` of each held-out prompt by its id (with a verifier).
        stopped_by: number of the signal that stopped the run early, or None.
    """

    student: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    directory: Path
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    samples: list[tuple[dict[str, Any], dict[str, Any]]] = field(repr=False)
    items: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    stopped_by: int | None = None

    def push_to_hub(self, repository: str) -> None:
        """Upload the saved student, with its model card, to ORG/NAME, which is made, private, where there is none. Of
        several processes the main one does.

        Raises:
            RecipeError: no token, or this machine is told to stay off the hub.
            RunError: the upload failed; the message says why, and how to do it by hand.
        """
        if main_process():
            upload(self.directory, repository)


LiveOrNamed: TypeAlias = "str | Mapping[str, object] | Choice | torch.nn.Module | DiffusionPipeline"
"""A hub name or folder, a recipe's block for the model, or the model itself: of transformers, peft or diffusers."""


def distill(
    student: LiveOrNamed,
    teacher: LiveOrNamed | list[LiveOrNamed] | tuple[LiveOrNamed, ...] | None = None,
    prompts: str | Path | Mapping[str, object] | Prompts | Iterable[object] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    resume: bool | str = False,
    force_changed: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Callback | GeneralTracker] = (),
    **settings: object,
) -> Result:
    """Distil `teacher` into `student` on the student's own trajectories.

    Args:
        student: hub name or folder, a mapping of the recipe's `student` block, or a live model (of transformers, or a
            pipeline of diffusers), which is then trained in place; with settings `{"model": pipe, "guidance": 4.5}`.
        teacher: the same for the teacher, `"self"`-kind mappings included, or a list of several; none where no
            objective compares with one (`sft`, `grpo`).
        prompts: strings, chats (lists of messages), rows, a `datasets.Dataset`, the name of a file or data set, or a
            mapping of the recipe's `prompts` block.
        tokenizer: needed with a live language model; live teachers share it.
        overwrite, resume, force_changed: as of `execute`; `resume` may also be what a recipe says, `"auto"`.
        quiet: no progress bar.
        callbacks: who is told what the run measures: objects of `opd.Callback`, and trackers of `accelerate` that are
            there already (`GeneralTracker`) beside those that `tracking.trackers` names.
        **settings: any other key of a recipe: `objective="reverse_kl"`, `steps=100`,
            `update={"learning_rate": 1e-4}`, `batch={"prompts": 8}`, `output="runs/mine"`, ...

    Returns:
        The trained student and what was measured.

    Raises:
        OpdError: for anything that the caller can mend; the message names the key and the fix.
    """
    teachers = list(teacher) if isinstance(teacher, list | tuple) else [] if teacher is None else [teacher]
    if prompts is None:
        raise RecipeError(
            "distill(): prompts is missing; give strings, rows, a datasets.Dataset, the path of a file, or a mapping "
            "such as {'kind': 'dataset', 'path': 'org/questions'}"
        )
    if isinstance(resume, str):
        settings["resume"] = resume
    recipe = parse_recipe(
        {
            "student": _student_block(student),
            "teacher": [_block(t, lambda policy: policy.teacher) for t in teachers],
            "prompts": _prompt_block(prompts),
            **settings,
        },
        "distill()",
    )
    context = Context(device=device_of(recipe), temperature=recipe.temperature, seed=recipe.seed)
    model = _model_of(student)
    policy, policies = _policy_of(model), [_policy_of(t) for t in teachers]
    if policy is not None:
        own = {id(weight) for weight in policy.weights(model)}
        for p, t in zip(policies, teachers, strict=True):
            if p is not None and any(id(weight) in own for weight in p.weights(t)):
                raise RunError(
                    "distill() got a live teacher that has the live student's own weights, which training moves; pass "
                    "teacher={'kind': 'self', 'mode': 'frozen'} for the student as it is now, or a copy.deepcopy"
                )
    live_student = recipe.student.live_student(model, tokenizer, context) if policy else None
    live_teachers = None
    if any(policies):
        live_teachers = [p.live_teacher(t, tokenizer, context) for p, t in zip(policies, teachers, strict=True) if p]
        if len(live_teachers) < len(teachers):
            raise RunError("distill() takes live teachers all together; pass all as objects, or names for all")
    return execute(
        recipe,
        overwrite=overwrite,
        resume=resume is True,
        force_changed=force_changed,
        quiet=quiet,
        student=live_student,
        teachers=live_teachers,
        callbacks=callbacks,
    )


@without_library_bars()
def execute(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force_changed: bool = False,
    quiet: bool = False,
    console: Console | None = None,
    student: Student | None = None,
    teachers: Sequence[LiveTeacher] | None = None,
    callbacks: Sequence[Callback | GeneralTracker] = (),
) -> Result:
    """Run a recipe from start to finish and write its directory.

    Args:
        recipe: what to run.
        overwrite: replace an earlier run in the same directory.
        resume: go on with the run in that directory from its newest sound checkpoint, bit for bit; from the start where
            it was killed before the first one. `resume: auto` in the recipe does the same, and begins a run where
            there is none.
        force_changed: resume although keys that can change training differ from the checkpoint's.
        callbacks: as of `distill`.

    Raises:
        OpdError: for anything that the caller can mend; what was complete before is still there.
    """
    told = Callbacks(callbacks)
    check_live_trackers(recipe, told.trackers)
    check_trackers(recipe.tracking.trackers)
    if resume and overwrite:
        raise RunError(f"{RESUME} goes on with a run and {OVERWRITE} removes it; give one of them")
    if resume and not recipe.directory.is_dir():
        raise RunError(f"nothing to resume: there is no run directory {recipe.directory}; drop {RESUME} to start one")
    refuse_place(recipe)
    refuse_links(recipe.directory)
    if recipe.push_to is not None:
        check_push(recipe.push_to)
    if not (resume or overwrite or recipe.resume == "auto"):
        refuse_occupied(recipe.directory)
    check_ahead(recipe)
    bad: list[DataError] = []
    data = load_data(recipe, bad)
    monitor = Monitor(recipe.directory, console, quiet, told)
    monitor.warn_of_skipped(bad)
    for warning in [*answers_taken([*data[0], *data[1]]), *not_held_out(recipe, *data)]:
        monitor.warn(warning)
    with locked(recipe.directory), monitor.signals_handled(), _shortages_named(recipe.directory), ExitStack() as around:
        earlier = False
        found, going_on = None, resume or (recipe.resume == "auto" and not overwrite)
        if going_on:
            found = newest(recipe, identity(recipe, itertools.chain(*data)), force_changed, monitor.warn)
        if found is None:
            earlier = must_clear(recipe, overwrite, unfinished=going_on)
        monitor.opening(recipe)
        servers = servers_of(recipe, recipe.directory / FOLDER)
        around.enter_context(started(servers, monitor.status, monitor.give_up))
        with monitor.status("loading models and checking that they fit together"):
            run = assemble(recipe, monitor, student=student, teachers=teachers, data=data)
            around.callback(run.close)
            for text in run.student.check_savable():
                monitor.warn(text)
            if found is not None:
                folder, facts = found
                changed = changes(facts, run.checkpoints.facts(run))
                refuse_changes(changed, folder, force_changed, misfit(run.student.module.parameters(), folder))
                _restore(run, folder, changed)
                monitor.console.print(f"going on from step {run.step} ({folder})", highlight=False, soft_wrap=True)
            elif going_on and (resume or earlier):
                monitor.warn(
                    f"there is no checkpoint in {recipe.directory} to go on from: the run begins from the start"
                )
            if going_on:
                # Also where no checkpoint was written: what was spent before is not forgotten with the directory.
                for note in run.optimiser.recall():
                    monitor.warn(note)
        if earlier:
            # Not before everything has been checked: a mistake in the recipe costs no finished run.
            # A run that begins again has spent what it had spent, also where it ends before its next step.
            clear(recipe.directory, keep=(ACCOUNT,) if going_on else ())
        # Events that an earlier process logged beyond the checkpoint are not shown.
        since = {"tensorboard": {"purge_step": run.step + 1}} if found is not None else {}
        run.accelerator.log_with += told.trackers
        run.accelerator.init_trackers(recipe.tracking.project, config=_flat(recipe.dump()), init_kwargs=since)
        if run.accelerator.is_main_process:
            (recipe.directory / "summary.json").unlink(missing_ok=True)
            write_whole(recipe.directory / "recipe.yaml", recipe.to_yaml())
            _write_environment(run, resumed=found is not None)
        try:
            if run.accelerator.is_main_process:
                told.tell("on_start", recipe)
            train(run)
            result = finish(run)
            if run.accelerator.is_main_process:
                told.tell("on_end", result.directory, result.summary)
            return result
        except BaseException as error:
            # Trackers keep their last events for minutes; now is the time to write them.
            for tracker in run.accelerator.trackers:
                tracker.finish()
            if run.accelerator.is_main_process:
                tell_what_is_left(error, run, by_python=bool(callbacks))
            raise


@contextmanager
def _shortages_named(directory: Path) -> Iterator[None]:
    """One message for a disk or a memory that is full, wherever nobody who knows more has caught it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"cannot write to {directory} ({error.strerror}); free some space and go on with {RESUME}: what was "
            "complete before is still there"
        ) from None
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise RunError(
            f"out of memory outside of the micro-batches ({str(error).splitlines()[0][:120]}); lower rollout.batch or "
            f"teacher.batch, or set teacher.offload=true, and go on with {RESUME} and {FORCE_CHANGED}"
        ) from None


def _restore(run: Run, folder: Path, changed: Sequence[str]) -> None:
    """Take a checkpoint's state up.

    Raises:
        RunError: it does not fit, with what `changed` since it was written.
    """
    try:
        run.restore(read(folder))
    except RunError as error:
        if not changed:
            raise
        raise RunError(
            f"{error}.\nIt is of {folder}, and since then {'; '.join(changed[:6])}: {FORCE_CHANGED} cannot help here; "
            "undo the change, or start another run with output=PATH"
        ) from None


def _write_environment(run: Run, resumed: bool) -> None:
    """environment.json of the run's start, with a line for every process that went on with it."""
    path, facts = run.recipe.directory / "environment.json", environment(run.recipe.seed)
    teachers = [member for teacher in run.teachers for member in teacher.members().values()]
    facts["models"] = {"student": size_of(run.student), "teachers": [size_of(teacher) for teacher in teachers]}
    if resumed:
        first = read_json(path) or facts
        # recipe.yaml is written anew, and its relative paths are of this process.
        here = {DIRECTORY: facts.pop(DIRECTORY)}
        facts = {**first, **here, "resumed": [*first.get("resumed", []), {"step": run.step, **facts}]}
    write_whole(path, json.dumps(facts, indent=2) + "\n")


def chain(
    recipes: Sequence[Recipe], *, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> Iterator[Result]:
    """Run recipes one after the other: each starts from the student that the one before saved.

    The student's other settings (`lora`, `freeze`, `template`, ...) stay each recipe's own, but for `drop_layers`,
    `tokenizer` and `revision`, which belong to the model that is replaced. A link that is stopped by a signal ends the
    chain; the same call with `resume` goes on with it.

    Args:
        overwrite: replace earlier runs in the same directories.
        resume: go on with the links that were begun, as `resume: auto` in each of the recipes.
    """
    if resume and overwrite:
        raise RunError(f"{RESUME} goes on with a chain and {OVERWRITE} removes it; give one of them")
    if resume:
        recipes = [recipe.model_copy(update={"resume": "auto"}) for recipe in recipes]
    folders = [str(recipe.directory.resolve()) for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise RunError("two recipes of the chain write to one directory; give each its own name or output")
    for recipe in recipes:
        check_trackers(recipe.tracking.trackers)
        refuse_place(recipe)
        if not overwrite and recipe.resume == "never":
            refuse_occupied(recipe.directory)
    before: Path | None = None
    for recipe in recipes:
        if before is not None:
            changes: dict[str, Any] = {
                "model": str(before / "student"),
                "tokenizer": None,
                "revision": None,
                "drop_layers": [],
                "adapter": None,
            }
            known = {key: value for key, value in changes.items() if key in type(recipe.student).model_fields}
            recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update=known)})
        result = execute(recipe, overwrite=overwrite, quiet=quiet)
        yield result
        if result.stopped_by is not None:
            return
        before = recipe.directory


def finish(run: Run) -> Result:
    """Save the student and the summary of a run whose loop has ended."""
    monitor, recipe = run.monitor, run.recipe
    assert monitor.before is not None
    assert monitor.after is not None
    ended_by = run.watch.ended_by or run.optimiser.ended_by or monitor.ended_by
    if ended_by is None and monitor.stopped_by is not None:
        ended_by = f"{signal.Signals(monitor.stopped_by).name} after step {run.step}"
    summary = {
        "before": monitor.before.metrics,
        "after": monitor.after.metrics,
        "held_out_prompts": len(run.held_out),
        **_compared(run),
        "seconds": round(monitor.seconds, 1),
        "steps": run.step,
        "stopped_early": run.step < recipe.steps and (run.stop_requested() or ended_by is not None),
        "ended_by": ended_by if run.step < recipe.steps else None,
        "best": _best(run),
        "alarms": run.watch.alarms,
        "skipped_updates": run.skips.total,
        "empty_updates": run.skips.empty,
        "peak_memory_bytes": peak_memory_bytes(),
        **run.optimiser.facts(),
        **promises.in_summary(recipe.dump()),
        **_prompt_tokens(run),
    }
    if different_prompts(summary) and run.accelerator.is_main_process:
        monitor.warn(held_out_told(summary))
    if run.skips.empty and run.accelerator.is_main_process:
        monitor.warn(f"{run.skips.empty} of {run.step} steps had nothing to learn, and their updates were not taken")
    # What is saved and returned is what was measured; training, should it go on, does so from the checkpoint.
    run.optimiser.settle()
    # The wrapper of several processes goes before their group does: whoever frees the group last waits for its threads,
    # and the wrapper would do so while it holds Python's lock, which they need.
    run.student.unwrap(run.accelerator)
    run.accelerator.wait_for_everyone()
    different = save_run(run, summary) if run.accelerator.is_main_process else None
    run.accelerator.free_memory()
    run.accelerator.end_training()
    if different is not None:
        raise RunError(
            f"{different}. Its files are kept; the trained state is also in the newest checkpoint, if there is one"
        )
    student, tokenizer = run.student.live()
    return Result(
        student=student,
        tokenizer=tokenizer,
        directory=recipe.directory,
        before=monitor.before.metrics,
        after=monitor.after.metrics,
        history=monitor.history,
        summary=summary,
        samples=_pairs(monitor.before, monitor.after, recipe.evaluation.samples),
        items=monitor.after.items,
        stopped_by=monitor.stopped_by,
    )


def _compared(run: Run) -> dict[str, Any]:
    """`compared`: of how many held-out prompts the teacher's figures are, before and after training and in both, where
    it did not answer about all."""
    of_both = [run.monitor.before, run.monitor.after]
    gone = [set().union(*gather_object([found.left_out if found is not None else frozenset()])) for found in of_both]
    if not any(gone):
        return {}
    counts = zip(("before", "after", "both"), (gone[0], gone[1], gone[0] | gone[1]), strict=True)
    return {"compared": {name: len(run.held_out) - len(each) for name, each in counts}}


def _prompt_tokens(run: Run) -> dict[str, Any]:
    """`prompt_tokens`: how long held-out prompts are on average for the student and for its teacher, where one teacher
    has another view."""
    student = [run.student.prompt_length(prompt) for prompt in run.held_out]
    teacher = [each.prompt_length(prompt) for each in run.teachers[:1] for prompt in run.held_out]
    # Lengths in another tokenizer's tokens say nothing of what was read.
    of_another = any(teacher.translates for teacher in run.teachers)
    if len(run.teachers) != 1 or of_another or None in student or None in teacher or student == teacher:
        return {}
    means = (sum(filter(None, lengths)) / len(lengths) for lengths in (student, teacher))
    return {"prompt_tokens": dict(zip(("student", "teacher"), (round(mean, 1) for mean in means), strict=True))}


def _best(run: Run) -> dict[str, Any] | None:
    """The best measurement of the metric that the recipe asks to be kept or waited for."""
    recipe = run.recipe
    stop = recipe.evaluation.stop
    metric = recipe.checkpoint.keep_best or (None if stop is None else stop.metric)
    found = None if metric is None else best_of(run.monitor.history, metric, type(recipe.evaluation))
    if found is None:
        return None
    step, value = found
    return {"metric": metric, "value": value, "step": step, "stored": step in steps_stored(recipe.directory)}


def assembled(
    recipe: Recipe,
    *,
    teachers: Sequence[LiveTeacher] | None = None,
    data: tuple[list[Prompt], list[Prompt]] | None = None,
    quiet: bool = True,
    console: Console | None = None,
) -> Run:
    """A recipe's run, built and checked but not trained: to measure or to look at. Nothing is written, and servers are
    not started. `close` it where a server takes part. `data` are the prompts of `load_data`, read unless given."""
    monitor = Monitor(recipe.directory, console, quiet)
    with monitor.status("loading models and checking that they fit together"):
        return assemble(
            recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"trackers": []})}),
            monitor,
            teachers=teachers,
            data=data,
        )


@without_library_bars()
def measure(
    recipe: Recipe,
    *,
    trained: Recipe | None = None,
    run: Path | None = None,
    quiet: bool = False,
    console: Console | None = None,
) -> HeldOut:
    """Held-out metrics of a recipe's student against its teacher, without training.

    Args:
        trained: the recipe that the student was trained by, where `recipe` names a trained student in place of its own:
            a teacher that is the student itself is made of the one that training began with.
        run: its directory, from whose last checkpoint a teacher that followed the student is taken. Of its own student
            a line warns where prompts are measured that it trained on.

    Raises:
        RunError: that teacher cannot be made again.
    """
    teachers = None if trained is None else self_teachers(trained, run)
    shown = Monitor(recipe.directory, console, quiet)
    bad: list[DataError] = []
    data = load_data(recipe, bad)
    shown.warn_of_skipped(bad)
    if run is not None and Path(str(getattr(recipe.student, "model", None))).resolve() == (run / "student").resolve():
        recorded = load_recipe(str(run / "recipe.yaml"), recorded=True)
        for warning in trained_on(recipe, recorded, data[1]):
            shown.warn(warning)
    with started(servers_of(recipe, recipe.directory / FOLDER), shown.status):
        built = assembled(recipe, teachers=teachers, data=data, quiet=quiet, console=console)
        with closing(built), built.monitor.status("measuring the student on held-out prompts"):
            return evaluate(built)


def upload(directory: Path, repository: str) -> list[str]:
    """Upload a run's saved student, or a folder that `opd` saved one in; errors are those of `Result.push_to_hub`.

    Returns:
        What lies in the folder and was left out, since `opd` did not write it.
    """
    inside = directory / "student"
    folder = inside if inside.is_dir() else directory
    if not listed(folder):
        raise RunError(f"{directory} holds no student that opd saved; give the directory of a run, or its student/")
    check_push(repository)
    failed = push(folder, repository)
    if failed is not None:
        raise RunError(failed)
    return foreign(folder)


def export(
    directory: Path, out: Path, step: int | None = None, *, form: str | None = None, overwrite: bool = False
) -> Path:
    """Write the student of a checkpoint (default: the newest) to `out`, as its library loads it. Of a run without
    checkpoints, its saved student in another format.

    Args:
        form: of a drafter the format: native (default), speculators or transformers.
        overwrite: replace the model that `opd` wrote into `out`.

    Raises:
        RunError: no checkpoint of that step, or a damaged one; or `out` holds something.
        RecipeError: a format that students of this kind are not written in.
        ModelError: the format has no place for this drafter, or who loads it would misread it.
    """
    if not directory.is_dir():
        raise RunError(f"run directory {directory} does not exist; give the directory that a run wrote (its output)")
    refuse_taken(out, overwrite)
    steps, saved = steps_stored(directory), directory / "student"
    if (directory / ORIGIN).is_file() and not steps:
        raise RunError(f"{directory} is a saved student; give the directory of its run, mostly {directory.parent}")
    if not steps and step is None and saved.is_dir() and form is not None:
        recipe = load_recipe(str(directory / "recipe.yaml"), [f"student.model={json.dumps(str(saved))}"], recorded=True)
        _check_form(recipe, form)
        student = recipe.student.build(Context(torch.device("cpu")))
        after = recipe.steps
    elif not steps or (step is not None and step not in steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        instead = f"there are {', '.join(map(str, steps))}" if steps else "checkpoint.every writes them"
        trained = f"; what it trained is in {saved}" if saved.is_dir() and not steps else ""
        raise RunError(f"{directory} has {which}; {instead}{trained}")
    else:
        folder = folder_of(directory, steps[0] if step is None else step)
        facts = verify(folder)
        home = elsewhere(facts)
        block = facts["recipe"] if home is None else anchored(facts["recipe"], home)
        recipe, after = parse_recipe(block, str(folder), recorded=True), facts["step"]
        _check_form(recipe, form)
        student = recipe.student.build(Context(torch.device("cpu")))
        if facts["weights"]["student"] != student.fingerprint():
            raise RunError(f"{folder} belongs to other weights than {student_of(facts['recipe']['student'])!r} has now")
        parts = read(folder)["parts"]
        student.load_state_dict({**parts["student"], **parts["optimiser"].get("average", {})})
    written = student if form is None else student.written_as(form)
    with whole_folder(out) as partial:
        lacking = written.save(partial, card(recipe, written.library, after))
        models = promises.listed(promises.in_summary(recipe.dump()))
        promised = promises.written([*promises.of_run(directory, recipe.name), *models])
        write_origin(partial, teachers=getattr(student, "origin", {}).get("teachers", []), **promised)
    different = written.compare(out)
    lacking += [] if different is None else [different]
    if lacking:
        raise RunError(f"{'; '.join(lacking)}. The weights are in {out}")
    return out


def _check_form(recipe: Recipe, form: str | None) -> None:
    if form is not None and form not in recipe.student.formats:
        known = ", ".join(recipe.student.formats)
        raise RecipeError(
            f"--as is {form!r}, and a student of kind {kind_of(recipe.student)!r} is written "
            + (f"as one of {known}" if known else "in one format alone: leave --as out")
        )


def _policy_of(model: Any) -> type[Policy] | None:
    """The policy that a live model is of, or None for what is no model."""
    found = (cls for cls in choices_of(Policy).values() if issubclass(cls, Policy) and cls.takes(model))
    return next(found, None)


def _model_of(student: Any) -> Any:
    return student.get("model") if isinstance(student, Mapping) else student


def _student_block(student: Any) -> Any:
    """A live model may come with settings, except for those that say how one is loaded."""
    policy = _policy_of(_model_of(student))
    if policy is None or not isinstance(student, Mapping):
        return _block(student, kind_of)
    strange = [key for key in student if key not in ("model", *policy.of_live)]
    if strange:
        raise RecipeError(
            f"student.{strange[0]} is {student[strange[0]]!r} beside a live model, which takes "
            f"{', '.join(policy.of_live)}; remove the key, or give a folder as student.model"
        )
    return {**student, "kind": kind_of(policy), "model": LIVE}


def _block(model: Any, kind: Callable[[type[Policy]], str]) -> Any:
    policy = _policy_of(model)
    if policy is not None:
        return {"kind": kind(policy), "model": LIVE}
    return model


def _prompt_block(prompts: Any) -> Any:
    if isinstance(prompts, Path):
        return Prompts.shorthand(str(prompts)) or {"kind": "file", "path": str(prompts)}
    kind = type(prompts).__name__
    if kind in ("DatasetDict", "IterableDatasetDict"):
        raise RecipeError(
            f"distill(): prompts is a {kind} of the splits {', '.join(prompts)}; give one of them, "
            f"prompts=data[{next(iter(prompts), 'train')!r}]"
        )
    if kind == "IterableDataset":
        raise RecipeError(
            "distill(): prompts is an IterableDataset, which may have no end, and prompts are all read at the start; "
            "give so many of its rows, prompts=list(data.take(10_000))"
        )
    if isinstance(prompts, str | dict) or hasattr(prompts, "load"):
        return prompts
    if isinstance(prompts, Iterable):
        rows = encoded_images(prompts) if hasattr(prompts, "cast_column") else prompts
        return {"kind": "inline", "prompts": [_row(row) for row in rows]}
    return prompts


def _row(given: Any) -> Any:
    """A text or a row; a list is a chat."""
    return dict(given) if isinstance(given, Mapping) else {"prompt": given} if isinstance(given, list) else given


def _pairs(before: HeldOut, after: HeldOut, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    later = {row["id"]: row for row in after.rows}
    return [(row, later[row["id"]]) for row in before.rows if row["id"] in later][:count]


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted scalars, which is what trackers accept as a configuration."""
    if isinstance(data, dict):
        return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(data, list):
        return {k: v for i, value in enumerate(data) for k, v in _flat(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): data if isinstance(data, bool | int | float | str) else str(data)}
