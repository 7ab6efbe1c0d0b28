"""`opd rollout`: sample a recipe's trajectories into a store, shard by shard; a killed job goes on where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from opd.assembly import build_models, check_lengths, compute_device, make_accelerator
from opd.choice import kind_of
from opd.errors import RecipeError, RunError
from opd.jobs.work import work_through
from opd.language.tokens import tokens_of
from opd.policies.causal_lm import CausalLM, CausalLMStudent
from opd.policies.draft import Draft
from opd.policies.image_text import ImageText
from opd.prompts import load_prompts
from opd.provenance import versions
from opd.recipe import Recipe
from opd.remote.launch import FOLDER, servers_of, started
from opd.rollouts import Request, Rollout
from opd.rollouts.speculative import SpeculativeRollout
from opd.rollouts.stored import StoredRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.self_test import check_writers
from opd.store.pictures import pictures_of
from opd.store.shards import claim, tidy
from opd.store.store import Store, StoreHeader, VocabularyHeader
from opd.teachers import reasons
from opd.teachers.local import LanguageTeacher
from opd.weights import weights_hash


def sample(
    recipe: Recipe,
    path: Path,
    *,
    draws: int = 1,
    prompts_per_shard: int = 64,
    quiet: bool = False,
) -> Store:
    """Roll out every prompt of a recipe, those that it would hold out too, `batch.group` times a draw.

    Draw d uses the random stream that training uses in step d: the first draw of a prompt is what the untrained student
    would write in step 0. Several processes may work on one store; a shard is written by one of them.

    Args:
        draws: of all prompts; a store that has fewer gets the rest.
        prompts_per_shard: what a worker loses at most when it is killed.

    Raises:
        OpdError: when the store was begun with other settings, or the recipe samples nothing.
    """
    logs = path.with_name(f"{path.name}-{FOLDER}")
    with started(servers_of(recipe.rollout, logs, "rollout"), partial(_told, quiet)), ExitStack() as opened:
        return _sampled(recipe, path, draws, prompts_per_shard, quiet, opened)


@contextmanager
def _told(quiet: bool, text: str) -> Iterator[None]:
    if not quiet:
        print(f"opd: {text}", file=sys.stderr)
    yield


def _sampled(recipe: Recipe, path: Path, draws: int, prompts_per_shard: int, quiet: bool, opened: ExitStack) -> Store:
    if isinstance(recipe.rollout, StoredRollout):
        raise RecipeError("rollout is 'stored'; opd rollout makes such a store: give it the recipe that samples")
    if recipe.rollout.turnwise:
        raise RecipeError(
            f"rollout {kind_of(recipe.rollout)!r} gives the turns of episodes, and a store has rows of equally many "
            "completions of each prompt; train with it as it is"
        )
    if recipe.update.private and "rollouts" not in recipe.update.revealed:
        raise RecipeError(
            f"update {kind_of(recipe.update)!r} writes nothing of rollouts to the disk, and a store holds them; set "
            "update.reveals=[rollouts] where they may lie there"
        )
    if recipe.student.modality != "language":
        raise RecipeError(
            f"a store holds texts and the student is a {recipe.student.modality} model: see opd.jobs.images"
        )
    if isinstance(recipe.student, Draft):
        recipe = _of_target(recipe, recipe.student)
    if not isinstance(recipe.student, CausalLM | ImageText):
        raise RecipeError(
            f"a store holds texts of students of kind causal_lm or image_text, and student.kind is "
            f"{kind_of(recipe.student)!r}; train without a store"
        )
    recipe = recipe.at(0, recipe.steps)
    prompts = load_prompts(recipe.prompts)
    accelerator = make_accelerator(recipe)
    writing = recipe.teacher if _asks_teacher(recipe.rollout) else []
    student, teachers, context = build_models(
        recipe.model_copy(update={"teacher": writing}), compute_device(recipe, accelerator)
    )
    assert isinstance(student, CausalLMStudent)
    student.check_prompts(prompts, recipe.max_prompt_tokens)
    for prompt in prompts:
        pictures_of(prompt, student.language.encode(prompt))
    for note in student.notes:
        print(f"opd: {note}", file=sys.stderr)
    source = recipe.rollout.build(context, student, teachers)
    opened.callback(source.close)
    for warning in check_lengths(recipe, student, teachers, prompts, source):
        print(f"opd: {warning}", file=sys.stderr)
    if recipe.self_test:
        check_writers([source], prompts[:2], context)
    writers = [teacher for teacher in teachers if isinstance(teacher, LanguageTeacher)]
    header = StoreHeader(
        prompts=len(prompts),
        group=recipe.batch.group,
        draws=draws,
        prompts_per_shard=min(prompts_per_shard, len(prompts)),
        prompts_hash="",
        rollout=recipe.dump()["rollout"],
        temperature=float(recipe.temperature),
        seed=recipe.seed,
        budget=recipe.rollout.budget,
        authors=sorted(source.authors),
        student={"model": recipe.student.model_dump()["model"], "weights": weights_hash(student.language.model)},
        writers=[
            {"model": t.settings.model_dump()["model"], "weights": weights_hash(t.language.model)} for t in writers
        ],
        tokenizer=student.language.tokenizer_hash,
        template=student.language.template_hash,
        processor=student.language.processor_hash,
        end_ids=list(tokens_of(context).end_ids),
        **VocabularyHeader.of(tokens_of(context).vocabulary),
        versions=versions(),
    )
    by_id = {p.id: p for p in prompts}
    # What a job goes on with must be about the prompts that it began with; only then are draws added.
    begun = Store.create_or_continue(path, header.model_copy(update={"draws": 1}), list(by_id))
    for prompt in prompts:
        begun.check_prompt(prompt, student.language.encode(prompt))
    store = Store.create_or_continue(path, header, list(by_id))

    def write(shard: int) -> None:
        with claim(store.shard_path(shard)) as mine:
            if mine:
                draw, ids = store.part(shard)
                here = [by_id[name] for name in ids]
                asked = Request(here, store.header.group, store.header.budget, draw, recipe.rollout, context)
                written = source(asked)
                if written.lost is not None and bool(written.lost.any()):
                    raise RunError(
                        f"{int(written.lost.sum())} rollouts of shard {shard} could not be written "
                        f"({reasons([source])}): mend what failed and run opd rollout again, it goes on there"
                    )
                store.write(shard, written)

    work_through(store.missing(), store.header.shards, write, "sampling", quiet)
    tidy(store.shard_path(0).parent)
    return store


def _of_target(recipe: Recipe, student: Draft) -> Recipe:
    """A recipe by which the target of a drafter writes alone, what it writes while the drafter proposes.

    Raises:
        RecipeError: in this rollout it writes nothing.
    """
    rollout = recipe.rollout
    if not isinstance(rollout, SpeculativeRollout):
        raise RecipeError(
            f"student.kind is 'draft' and rollout is {kind_of(rollout)!r}, in which no target writes: take rollout "
            "speculative, whose texts are stored as the target writes them alone"
        )
    greedy = rollout.text_temperature == 0
    plain = StudentRollout(
        max_new_tokens=rollout.max_new_tokens, batch=rollout.batch, dtype="own", top_k=1 if greedy else 0
    )
    alone = {
        "student": CausalLM(**student.target.model_dump()),
        "teacher": [],
        "rollout": plain,
        "temperature": 1.0 if greedy else rollout.text_temperature,
    }
    return recipe.model_copy(update=alone)


def _asks_teacher(rollout: Rollout) -> bool:
    """Whether a teacher writes some of the trajectories."""
    return isinstance(rollout, TeacherRollout) or any(_asks_teacher(part) for part in rollout.parts)
