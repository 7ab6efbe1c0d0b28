"""The recipe: one choice per axis, typed and validated whole before anything heavy loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    NonNegativeInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from opd.choice import Choice, OneOf, Settings, as_list, choices_of, kind_of, nested
from opd.curricula import Curriculum
from opd.curricula.length_ladder import LengthLadder
from opd.curricula.shuffled import Shuffled
from opd.curricula.window import Window
from opd.divergences import ReverseKL
from opd.divergences.of_blocks import Rejected
from opd.errors import nearest
from opd.language.model import is_own
from opd.objectives import Objective
from opd.policies import Policy
from opd.policies.evaluation import Evaluation
from opd.prompts import Prompts
from opd.recipe.blocks import Batch, Checkpoint, Failures, Hardware, Tracking
from opd.recipe.private import check_private
from opd.reduction import Reduction
from opd.rollouts import Rollout
from opd.rollouts.anchored import AnchoredRollout
from opd.rollouts.demonstrations import DemonstrationRollout
from opd.rollouts.mixture import MixtureRollout
from opd.rollouts.speculative import SpeculativeRollout
from opd.rollouts.stored import StoredRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.switch import SwitchRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps, Scheduled
from opd.shaping import Shaping
from opd.shaping.outcomes import ByOutcome
from opd.shaping.uniform import Uniform
from opd.teachers import Teacher
from opd.teachers.scripted import ScriptedTeacher
from opd.teachers.showing import ShowingTeacher
from opd.teachers.stored import StoredTeacher
from opd.updates import Update
from opd.updates.plain import PlainUpdate
from opd.verifiers import Verifier


class OfStudent:
    """Annotation of the evaluation's block: it is the one that the student's policy names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        blocks = core_schema.union_schema([handler.generate_schema(block) for block in self.blocks()])
        return core_schema.with_info_before_validator_function(self._taken, blocks)

    @staticmethod
    def blocks() -> tuple[type[Evaluation], ...]:
        policies = (each for each in choices_of(Policy).values() if issubclass(each, Policy))
        return tuple(dict.fromkeys(policy.evaluation for policy in policies))

    def _taken(self, value: Any, info: ValidationInfo) -> Any:
        student = info.data.get("student")
        # Without a student, which is the mistake to tell of, there is nothing to compare with.
        block = self.blocks()[0] if student is None else student.evaluation
        return block.model_validate({} if student is None else value, context=info.context)


class Recipe(Settings):
    """A choice per axis and the few settings that belong to none. Fields are in the order of the loop."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="Of the run")
    description: str = Field("", description="Shown by `opd recipes`")
    output: str | None = Field(None, description="Run directory; default runs/NAME")
    seed: int = Field(0, ge=0, lt=2**32, description="Of sampling, order of prompts and new weights")
    steps: int = Field(100, ge=1, description="Optimiser steps")
    temperature: Annotated[float, OverSteps(ge=1e-6, le=1e6)] = Field(
        1.0, description="Softmax temperature of sampling, student and teacher alike"
    )
    student: Annotated[Policy, OneOf(Policy, "causal_lm")] = Field(description="The model that learns")
    teacher: Annotated[list[Annotated[Teacher, OneOf(Teacher, "local")]], BeforeValidator(as_list)] = Field(
        default=[], description="Who supervises; may be missing when no objective and no rollout asks a teacher"
    )
    prompts: Annotated[list[Annotated[Prompts, OneOf(Prompts, "file")]], BeforeValidator(as_list)] = Field(
        min_length=1, description="What the student answers; several sets are joined"
    )
    max_prompt_tokens: int = Field(1024, ge=1, description="A longer prompt is an error")
    skip_bad_prompts: bool = Field(False, description="Leave out rows that cannot be used, and say which")
    curriculum: Annotated[Curriculum, OneOf(Curriculum)] = Field(Shuffled(), description="Which prompts, how long")
    rollout: Annotated[Rollout, OneOf(Rollout, "student")] = Field(StudentRollout(), description="Who writes")
    end_tokens: list[NonNegativeInt] | None = Field(
        None, min_length=1, description="Ids that end a completion; default from the student"
    )
    verifier: Annotated[Verifier, OneOf(Verifier)] | None = Field(None, description="What a completion is worth")
    shaping: Annotated[list[Annotated[Shaping, OneOf(Shaping)]], BeforeValidator(as_list)] = Field(
        default=[Uniform()], min_length=1, description="What a position weighs; of several, weights are multiplied"
    )
    objective: Annotated[list[Annotated[Objective, OneOf(Objective)]], BeforeValidator(as_list)] = Field(
        default=[ReverseKL()], min_length=1, description="What a step descends; several are summed"
    )
    reduction: Reduction = Field("token_mean", description="How a step's losses become one number")
    update: Annotated[Update, OneOf(Update, "plain")] = Field(PlainUpdate(), description="How gradients become a step")
    batch: Batch = Field(Batch(), description="Trajectories of a step")
    evaluation: Annotated[Evaluation, OfStudent()] = Field(  # type: ignore[assignment]  # it becomes the student's
        default={}, description="Held-out measurements"
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="What `--resume` goes on from")
    resume: Literal["never", "auto"] = Field(
        "never", description="auto: go on where an earlier process of this run ended, if there was one"
    )
    failures: Failures = Field(Failures(), description="What to do about bad steps")
    tracking: Tracking = Field(Tracking(), description="Where metrics go")
    push_to: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Repository on the hub, ORG/NAME, that the saved student is uploaded to; a new one is private",
    )
    hardware: Hardware = Field(Hardware(), description="Device and precision")
    self_test: bool = Field(True, description="Check the pipeline on a tiny rollout before step one")
    try_next: str | None = Field(None, description="A command to suggest when the run ends")

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if value in (".", ".."):
            raise ValueError("it names the folder of the run, runs/NAME, and must be a folder of its own")
        return value

    @field_validator("checkpoint")
    @classmethod
    def _best_is_measured(cls, value: Checkpoint, info: ValidationInfo) -> Checkpoint:
        evaluation = info.data.get("evaluation")
        if value.keep_best and not (value.every and evaluation is not None and evaluation.every):
            raise ValueError("keep_best needs evaluations to choose from; set evaluation.every (and checkpoint.every)")
        if value.keep_best and evaluation is not None:
            try:
                evaluation.check_measure(value.keep_best)
            except ValueError as error:
                raise ValueError(f"keep_best: {error}") from None
        return value

    @model_validator(mode="after")
    def _one_modality(self) -> Recipe:
        student = self.student
        for key in type(self).model_fields:
            for part in nested(getattr(self, key)):
                if not part.fits(student.modality):
                    kinds = Objective if isinstance(part, Objective) else _axis(part)
                    fitting = [k for k, c in choices_of(kinds).items() if c.fits(student.modality)]
                    own = part.modality if isinstance(part.modality, tuple) else (part.modality,)
                    models = " and ".join(f"{each} models" for each in own)
                    axis = axis_of(part)
                    place = "" if axis == key else f" in {key}"
                    raise ValueError(
                        f"{axis} {kind_of(part)!r}{place} is for {models} and student {kind_of(student)!r} is of "
                        f"{student.modality}; {axis} choices that fit: {', '.join(fitting) or 'none'}"
                    )
        return self

    @model_validator(mode="after")
    def _shown_to_readers(self) -> Recipe:
        shown = [part for part in nested(self.teacher) if isinstance(part, ShowingTeacher) and part.shows]
        if shown and self.student.modality != "language":
            key = "system" if shown[0].system is not None else "examples"
            raise ValueError(
                f"teacher.{key} is written by the chat template of a language model, and student "
                f"{kind_of(self.student)!r} is of {self.student.modality}; remove the key"
            )
        return self

    @model_validator(mode="after")
    def _goes_with_the_student(self) -> Recipe:
        several = [*self.teacher, *self.objective, *self.shaping]
        for part in (self.rollout, *several, self.curriculum, *self.curriculum.rollouts):
            why = self.student.misfit(part)
            if why is not None:
                place = " in curriculum" if part in self.curriculum.rollouts else ""
                beside = f"beside student.kind {kind_of(self.student)}"
                raise ValueError(f"{axis_of(part)} {kind_of(part)!r}{place} {beside}: {why}")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Recipe:
        for key, why in self.student.unused.items():
            value = getattr(self, key)
            # A schedule equals its first value.
            if value != type(self).model_fields[key].default or key in self.scheduled():
                raise ValueError(f"{key} is {value!r}: {why}; remove the key")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        names = [t.name for t in self.teacher if t.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers have the names {names}; each name must be its own")
        writers = [("rollout", part) for part in nested(self.rollout)]
        writers += [("curriculum", part) for part in nested(self.curriculum)]
        for key, part in writers:
            if isinstance(part, TeacherRollout) and not self.teacher:
                raise ValueError(
                    f"key 'teacher' is required: {key} {kind_of(getattr(self, key))!r} lets a teacher write"
                )
            if isinstance(part, TeacherRollout) and part.teacher not in (None, *names):
                own = "rollout.teacher" if key == "rollout" else "curriculum.teacher.teacher"
                raise ValueError(
                    f"{own} is {part.teacher!r}{nearest(str(part.teacher), names)}; the recipe names "
                    f"{names or 'none'}: give that teacher a name"
                )
        asked = next((part for part in nested(self.teacher) if isinstance(part, StoredTeacher)), None)
        if asked is not None and not self.rollout.from_store:
            raise ValueError(
                f"teacher 'stored' answers only at trajectories of {asked.path}, and rollout {kind_of(self.rollout)!r} "
                "has others: take rollout: stored with that path, or a teacher that can be asked (local)"
            )
        shown = any(isinstance(part, DemonstrationRollout) for part in nested(self.rollout))
        if shown and any(isinstance(part, ScriptedTeacher) for part in nested(self.teacher)):
            raise ValueError(
                "teacher 'scripted' answers at states of a simulator alone, and rollout 'demonstrations' has none: "
                "take rollout: simulator, or a teacher of kind policy"
            )
        for objective in self.objective:
            kind = kind_of(objective)
            if objective.needs_teacher and not self.teacher:
                kinds = choices_of(Teacher)
                named = "model" in kinds[self.student.teacher].model_fields
                raise ValueError(
                    f"key 'teacher' is required: objective {kind!r} compares the student with a teacher; "
                    + (
                        "give the name or folder of a model (from Python also a live one), or one of kind "
                        f"{', '.join(each for each in kinds if each != 'local')}; or a list of them"
                        if named
                        else f"beside student.kind {kind_of(self.student)} write teacher: {self.student.teacher}"
                    )
                )
            if objective.teacher is not None and objective.teacher not in names:
                raise ValueError(
                    f"objective {kind!r} listens to teacher {objective.teacher!r}{nearest(objective.teacher, names)}; "
                    f"teachers with a name: {', '.join(names) or 'none'}. Set teacher.name"
                )
        learners: list[Objective | Shaping | Curriculum] = [*self.objective, *self.shaping, self.curriculum]
        # Episodes that are no answers need no verifier (`_counts_episodes`).
        for part in () if self.rollout.turnwise else learners:
            if part.needs_reward and self.verifier is None and not self.rollout.rewards:
                verb = "learns from" if isinstance(part, Objective) else "goes by"
                raise ValueError(f"key 'verifier' is required: {axis_of(part)} {kind_of(part)!r} {verb} its verdicts")
        for part in learners:
            if not isinstance(part, Curriculum) and part.compares_group and self.batch.group == 1:
                nothing = "learn nothing" if isinstance(part, Objective) else "change nothing"
                raise ValueError(
                    f"batch.group is 1: {axis_of(part)} {kind_of(part)!r} compares the trajectories of one prompt and "
                    f"would {nothing}; take 2 or more"
                )
        return self

    @model_validator(mode="after")
    def _counts_episodes(self) -> Recipe:
        """Refuse what would take the turns of an episode for answers to one prompt."""
        if not self.rollout.turnwise:
            return self
        kind = kind_of(self.rollout)
        if self.verifier is not None:
            raise ValueError(
                f"verifier {kind_of(self.verifier)!r} judges completions, and of rollout {kind!r} the environment "
                "judges episodes; remove it"
            )
        # One that compares over the whole step would count an episode as often as it has turns.
        comparing: list[Shaping | Curriculum] = [
            s for s in self.shaping if s.compares_group or isinstance(s, ByOutcome)
        ]
        comparing += [self.curriculum] if self.curriculum.needs_reward else []
        for part in comparing:
            raise ValueError(
                f"{axis_of(part)} {kind_of(part)!r} compares answers by what each is worth, and rollout {kind!r} "
                "gives the turns of episodes; take another one"
            )
        rewarded: list[Objective | Shaping] = [*self.objective, *self.shaping]
        for each in rewarded:
            if each.needs_reward and not self.rollout.rewards:
                raise ValueError(
                    f"{axis_of(each)} {kind_of(each)!r} goes by rewards, and rollout {kind!r} has none where the "
                    "student's own replies are not played; set rollout.history to student"
                )
        for teacher in nested(self.teacher):
            for key in ("sees", "about"):
                if getattr(teacher, key, None) is not None:
                    raise ValueError(
                        f"teacher.{key} is {getattr(teacher, key)!r}: a column of the row, which holds nothing of what "
                        f"was said since, and rollout {kind!r} asks about each turn of an episode; remove it"
                    )
            tokenizer = getattr(teacher, "tokenizer", None)
            if is_own(tokenizer):
                raise ValueError(
                    f"teacher.tokenizer is {tokenizer!r}: earlier replies of an episode stand in what is read by the "
                    f"ids that the student drew, which are others in that tokenizer; beside rollout {kind!r} take a "
                    "teacher of the student's tokenizer"
                )
        if getattr(self.evaluation, "teacher_answers", False) is True:
            raise ValueError(
                f"evaluation.teacher_answers has the teacher answer the rows, which with rollout {kind!r} are tasks of "
                "an environment; leave it out"
            )
        if self.update.private:
            raise ValueError(
                f"update {kind_of(self.update)!r} bounds what one trajectory adds, and rollout {kind!r} gives several "
                "of a record, one a turn; take another of them"
            )
        return self

    @model_validator(mode="after")
    def _keeps_private(self) -> Recipe:
        check_private(self)
        return self

    @model_validator(mode="after")
    def _does_what_it_says(self) -> Recipe:
        measured = [name for shaping in self.shaping for name in shaping.measures]
        if again := next((name for i, name in enumerate(measured) if name in measured[:i]), None):
            kinds = [kind_of(shaping) for shaping in self.shaping if again in shaping.measures]
            raise ValueError(f"shapings {' and '.join(kinds)} both measure {again!r}; list one of them")
        lacking = [name for name in self.curriculum.reads if name not in measured]
        if lacking:
            able = [k for k, c in choices_of(Shaping).items() if set(self.curriculum.reads) <= set(c.measures)]  # type: ignore[attr-defined]
            raise ValueError(
                f"curriculum {kind_of(self.curriculum)!r} follows {lacking[0]!r} at each position, which shaping "
                f"{' and '.join(repr(kind_of(each)) for each in self.shaping)} does not measure; shapings that do: "
                f"{', '.join(able) or 'none'}"
            )
        narrow = next((shaping for shaping in self.shaping if self.curriculum.reads and shaping.narrows), None)
        if narrow is not None:
            raise ValueError(
                f"curriculum {kind_of(self.curriculum)!r} follows {self.curriculum.reads[0]!r} at each position, and "
                f"shaping {kind_of(narrow)!r} takes trajectories out of what is measured; set its denominator to fixed"
            )
        vain = next((shaping for shaping in self.shaping if shaping.weighs), None)
        if vain is not None and not any(objective.shaped for objective in self.objective):
            said = " and ".join(repr(kind_of(objective)) for objective in self.objective)
            raise ValueError(
                f"shaping {kind_of(vain)!r} weighs positions, and objective {said} takes no weights of a shaping, as "
                f"those do that compare with a teacher: {vain.unweighed}"
            )
        drafting = [part for part in nested(self.rollout) if isinstance(part, SpeculativeRollout | AnchoredRollout)]
        given = drafting and all(isinstance(part, AnchoredRollout) and part.slots == "text" for part in drafting)
        if given and any(isinstance(objective, Rejected) for objective in self.objective):
            raise ValueError(
                "rollout.slots is 'text': every slot holds what the target wrote and none is rejected, so objective "
                "'rejected' would learn nothing; remove it, or take slots: drafter"
            )
        plain = [None if o.scheduled() else o.model_dump_json() for o in self.objective]
        twice = next((o for i, o in enumerate(self.objective) if plain[i] and plain[i] in plain[:i]), None)
        if twice is not None:
            raise ValueError(f"objective {kind_of(twice)!r} is listed twice alike; list it once, with weight: 2")
        for key, parts in (("objective", self.objective), ("teacher", self.teacher)):
            weights = [part.weight for part in parts]
            if key == "teacher" and not all(objective.needs_teacher for objective in self.objective):
                continue
            if weights and not any(weights) and not any(isinstance(weight, Scheduled) for weight in weights):
                raise ValueError(f"{key}.weight is 0 wherever there is one: nothing would be learnt; give one a weight")
        if isinstance(self.curriculum, LengthLadder | Window) and not self.rollout.scheduled():
            # Where there are several sources, they keep to their own lengths; elsewhere the curriculum's count.
            ladder = isinstance(self.curriculum, LengthLadder)
            key = "curriculum.lengths" if ladder else "curriculum.maximum"
            instead = "leave out the longer rungs" if ladder else "lower the maximum"
            # Blocks are placed in texts that are no longer than they are.
            written = self.rollout.texts if isinstance(self.rollout, AnchoredRollout) else self.rollout
            longest = own = self.curriculum.longest or self.rollout.longest
            stored = [part for part in nested(self.rollout) if isinstance(part, StoredRollout)]
            if isinstance(self.rollout, MixtureRollout):
                own = min(part.budget for part in self.rollout.parts)
            elif isinstance(written, StoredRollout):
                own = written.budget
            elif isinstance(self.rollout, SwitchRollout):
                own = self.rollout.budget
                if self.rollout.position >= longest:
                    raise ValueError(
                        f"rollout.position is {self.rollout.position} and {key} goes up to {longest}: "
                        "rollout.then would never write; lower position"
                    )
            short = next((part for part in stored if part.held == own), None)
            if longest > own and short is not None:
                raise ValueError(
                    f"{key} goes up to {longest} and the rows of {short.path} to {own} tokens; {instead}, or sample "
                    "the store again with a larger rollout.max_new_tokens"
                )
            if longest > own and isinstance(written, StoredRollout):
                place = "rollout" if written is self.rollout else "rollout.texts"
                raise ValueError(
                    f"{key} goes up to {longest} and {place}.max_new_tokens cuts stored trajectories at {own}; raise "
                    f"it, or {instead}"
                )
            if longest > own:
                raise ValueError(
                    f"{key} goes up to {longest} and a source of the {kind_of(self.rollout)} to {own} tokens; raise "
                    f"its max_new_tokens, or {instead}"
                )
        return self

    @property
    def directory(self) -> Path:
        return Path(self.output or f"runs/{self.name}").expanduser()

    def dump(self) -> dict[str, Any]:
        """The whole resolved recipe as plain data."""
        data = self.model_dump(mode="json", serialize_as_any=True)
        for key, schedule in self.scheduled().items():
            *parents, leaf = key.split(".")
            place: Any = data
            for part in parents:
                place = place[int(part) if isinstance(place, list) else part]
            place[int(leaf) if isinstance(place, list) else leaf] = schedule.plain()
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


def axis_of(part: Choice) -> str:
    """What a person calls the axis of a part; a divergence is an objective."""
    return "objective" if isinstance(part, Objective) else part.axis


def _axis(part: Choice) -> type[Choice]:
    """The base of a part's axis."""
    return next(c for c in type(part).__mro__ if "axis" in vars(c))


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, object, object]]:
    """`(dotted key, value in a, value in b)` wherever two dumped recipes differ."""
    found: list[tuple[str, object, object]] = []
    for key in dict.fromkeys([*a, *b]):
        left, right = a.get(key), b.get(key)
        left, right = (_by_index(side) for side in (left, right))
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append((prefix + key, left, right))
    return found


def _by_index(value: Any) -> Any:
    """A list of mappings as a mapping, so that only the items that differ are named."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return value
