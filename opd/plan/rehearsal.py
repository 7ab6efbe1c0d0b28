"""What a start would refuse, or warn of, once its models are loaded, as far as it needs no weights: the parts of a run
are built with models on the meta device, and the functions that check a run check them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from opd.assembly import build_models, check_lengths, check_taught, check_written, load_data, read_by_all
from opd.choice import nested
from opd.context import Context
from opd.distributions import Categorical
from opd.errors import DataError
from opd.language.adapters import adapter_of
from opd.language.agreement import check_tokenizers
from opd.language.model import ModelSettings, is_own
from opd.language.source import is_here
from opd.language.student import LanguageStudent
from opd.plan.at_hand import stores_not_here
from opd.policies.causal_lm import CausalLM
from opd.policies.image_text import ImageText
from opd.provenance import models_of
from opd.recipe import Recipe
from opd.rollouts import Rollout
from opd.rollouts.agent import AgentRollout
from opd.rollouts.data import DataRollout
from opd.rollouts.mixture import MixtureRollout
from opd.rollouts.stored import StoredRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.switch import SwitchRollout
from opd.rollouts.teacher import TeacherRollout
from opd.teachers import Teacher
from opd.teachers.debate import DebateTeacher
from opd.teachers.local import ScoringSettings
from opd.teachers.routed import RoutedTeacher
from opd.teachers.self_teacher import SelfTeacher
from opd.teachers.served import ServedTeacher
from opd.teachers.stored import StoredTeacher
from opd.watches import Watch

TEACHERS = (ScoringSettings, SelfTeacher, RoutedTeacher, DebateTeacher, StoredTeacher)
"""Teachers that can be built without weights; a server would have to run."""
ROLLOUTS = (
    AgentRollout,
    DataRollout,
    MixtureRollout,
    StoredRollout,
    StudentRollout,
    SwitchRollout,
    TeacherRollout,
)
"""Rollouts that can be built on such models."""
FIRST = 512
"""Prompts that are read."""
T = TypeVar("T")


def rehearse(recipe: Recipe, notes: list[str]) -> None:
    """Build and check what a run of a language model builds and checks at its start, its weights apart.

    Args:
        notes: gets what a run would warn of, and what could not be looked at since its files are not on this machine.

    Raises:
        OpdError: what a run would refuse, in the same words.
    """
    student = recipe.student
    if not isinstance(student, CausalLM | ImageText) or any(source.remote is not None for source in recipe.prompts):
        return
    settings: list[object] = [student, *nested(recipe.teacher)]
    away = [part.model for part in settings if isinstance(part, ModelSettings) and not _is_here(part)]
    if away:
        notes.append(
            f"{', '.join(dict.fromkeys(away))}: not on this machine, or still to be converted; a run checks at its "
            "start that student and teachers fit together, and that texts are not too long for them"
        )
        return
    teachers = [teacher for teacher in recipe.teacher if all(_can_be_built(part) for part in _own(teacher))]
    alone = recipe.model_copy(
        update={"teacher": [_without_place(teacher) for teacher in teachers], "rollout": _by_itself(recipe.rollout)}
    )
    with ExitStack() as opened:
        built_student, built, context = build_models(alone, torch.device("meta"))
        for teacher in built:
            opened.callback(teacher.close)
        check_taught(recipe, built_student, built, context)
        assert isinstance(built_student, LanguageStudent)
        _check_tokenizers_of_servers(recipe, built_student)
        notes += [*built_student.notes, *(note for teacher in built for note in teacher.notes)]
        if _can_write(recipe, len(teachers) == len(recipe.teacher)):
            _check_rollout(alone, built_student, built, context, opened, notes)


def _check_rollout(
    recipe: Recipe, student: LanguageStudent, built: list[Any], context: Context, opened: ExitStack, notes: list[str]
) -> None:
    rollout = recipe.rollout.build(context, student, built)
    opened.callback(rollout.close)
    check_written(recipe, rollout)
    bad: list[DataError] = []
    training, held_out = (prompts[:FIRST] for prompts in load_data(recipe, bad))
    training, held_out = read_by_all(recipe, (training, held_out), bad, context, student, built, rollout)
    lengths = check_lengths(recipe, student, built, [*training, *held_out], rollout)
    notes += [*rollout.notes, *lengths]


def _own(teacher: Teacher) -> Iterator[Teacher]:
    return (part for part in nested(teacher) if isinstance(part, Teacher))


def _can_be_built(teacher: Teacher) -> bool:
    stored = isinstance(teacher, StoredTeacher)
    return isinstance(teacher, TEACHERS) and (not stored or bool(teacher.answered(Categorical)))


def _is_here(settings: ModelSettings) -> bool:
    """Whether a model's configuration and its tokenizer can be read on this machine as they are."""
    revision = settings.revision
    source = adapter_of(settings.model, revision, local_only=True)
    model = is_here(settings.model, "config.json", revision) if source is None else is_here(source.base, "config.json")
    return model and is_here(settings.tokenizer_place, "tokenizer_config.json", revision)


def _without_place(value: T) -> T:
    """A teacher's settings without the device that it is loaded to."""
    if isinstance(value, dict):
        return {key: _without_place(part) for key, part in value.items()}  # type: ignore[return-value]
    if not isinstance(value, Teacher):
        return value
    changes: dict[str, Any] = {name: _without_place(part) for name, part in value if isinstance(part, dict | Teacher)}
    if isinstance(value, ScoringSettings):
        changes |= {"device": None, "offload": False}
    return value.model_copy(update=changes)


def _by_itself(rollout: Rollout) -> Rollout:
    """A rollout's settings without its engines, which would have to run."""
    changes: dict[str, Any] = {name: _by_itself(part) for name, part in rollout if isinstance(part, Rollout)}
    if getattr(rollout, "engine", None) is not None:
        changes["engine"] = None
    return rollout.model_copy(update=changes)


def _can_write(recipe: Recipe, all_teachers: bool) -> bool:
    """Whether the recipe's rollouts can be built: of kinds that are known, from stores that are here, and without a
    teacher that is not built."""
    parts = list(nested([recipe.rollout, *recipe.curriculum.rollouts]))
    known = all(isinstance(part, ROLLOUTS) for part in parts if isinstance(part, Rollout))
    asked = any(isinstance(part, TeacherRollout | AgentRollout | Watch) for part in parts)
    return known and not stores_not_here(recipe) and (all_teachers or not asked)


def _check_tokenizers_of_servers(recipe: Recipe, student: LanguageStudent) -> None:
    """Raise `IncompatibleError` where a server's tokenizer, which the recipe names and which is here, is not the
    student's."""
    for part in (part for teacher in recipe.teacher for part in _own(teacher)):
        if isinstance(part, ServedTeacher) and not is_own(part.tokenizer):
            place = part.tokenizer
            if place is not None and is_here(place, "tokenizer_config.json"):
                check_tokenizers(student.reader, part.reader(None), f"the teacher {models_of(part.model_dump())}")
