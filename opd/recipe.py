"""The recipe: one choice per axis, typed and validated whole before anything heavy loads."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from opd.checkpoints.keeper import Checkpoint
from opd.choice import Choice, OneOf, Settings, choices_of, nested, take_in
from opd.curricula import Curriculum
from opd.curricula.length_ladder import LengthLadder
from opd.curricula.shuffled import Shuffled
from opd.divergences import ReverseKL
from opd.errors import RecipeError, nearest
from opd.failures import Failures
from opd.hardware import DEVICE
from opd.objectives import Objective
from opd.policies import Policy
from opd.prompts import Prompts
from opd.recipe_text import read_plain, read_text
from opd.reduction import Reduction
from opd.rollouts import Rollout
from opd.rollouts.mixture import MixtureRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps, Scheduled
from opd.shaping import Shaping
from opd.shaping.uniform import Uniform
from opd.stopping import Alarm, Stop
from opd.teachers import Teacher
from opd.updates import Update
from opd.updates.plain import PlainUpdate
from opd.verifiers import Verifier


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


class Batch(Settings):
    """How many trajectories make one step, and how many of them share one forward pass."""

    prompts: int = Field(16, ge=1, le=1_000_000, description="Prompts of one optimiser step, over all processes")
    group: int = Field(1, ge=1, le=1_000_000, description="Trajectories of each prompt")
    micro: int = Field(16, ge=1, description="Trajectories of one forward and backward pass; changes memory only")


class Evaluation(Settings):
    """Measured on held-out prompts before and after training, and every `every` steps between."""

    every: int = Field(0, ge=0, description="Steps between evaluations; 0 = before and after only")
    k: int = Field(1, ge=1, le=10_000, description="Completions sampled of each held-out prompt, for Avg@k and Pass@k")
    greedy: bool = Field(False, description="Also measure greedy decoding")
    temperature: float | None = Field(None, ge=1e-6, le=1e6, description="Of held-out samples; default the run's")
    top_p: float | None = Field(None, gt=0, le=1, description="Of held-out samples; default the student rollout's or 1")
    top_k: int | None = Field(None, ge=0, description="Of held-out samples; default the student rollout's or 0")
    held_out: int = Field(32, ge=1, description="Prompts held out of the prompt set")
    prompts: Annotated[list[Annotated[Prompts, OneOf(Prompts, "file")]], BeforeValidator(_as_list)] = Field(
        default=[], description="A held-out set of its own, instead of a share of the prompt set"
    )
    max_new_tokens: int | None = Field(None, ge=1, le=10_000_000, description="Default: the rollout's")
    steps: int = Field(40, ge=1, description="Of a flow model's deterministic sampler")
    samples: int = Field(3, ge=0, description="Completions shown side by side, before and after")
    stop: Stop | None = Field(None, description="End the run when a held-out metric gains no more")
    alarm: Alarm | None = Field(Alarm(), description="Warn when held-out samples degenerate; null never warns")

    @model_validator(mode="after")
    def _stops_on_evaluations(self) -> Evaluation:
        key = "stop" if self.stop is not None else "alarm.stop" if self.alarm is not None and self.alarm.stop else ""
        if key and not self.every:
            raise ValueError(f"{key} ends a run by its evaluations, and evaluation.every is 0; set evaluation.every")
        return self


class Hardware(Settings):
    """Device and precision; everything else about devices is `accelerate`'s."""

    device: str = Field("auto", pattern=f"^auto$|{DEVICE}", description="As torch names it")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32",
        description="Compute dtype; weights keep the student's dtype. auto: bf16 where the device is fast at it",
    )
    threads: int | None = Field(None, ge=1, le=1024, description="torch's threads; default all cores")


class Tracking(Settings):
    """`accelerate`'s trackers; metrics.jsonl is always written."""

    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml"]] = Field(
        default=["tensorboard"], description="Trackers to log to"
    )
    project: str = Field("opd", description="Name under which the trackers put runs")

    @field_validator("trackers")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a tracker is listed twice; list each once")
        return value

    @field_validator("project")
    @classmethod
    def _inside_the_run(cls, value: str, info: ValidationInfo) -> str:
        """tensorboard makes a folder of it in the run's."""
        if "tensorboard" in info.data.get("trackers", ()) and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError("with tensorboard this is a folder in the run directory; give a name without '..'")
        return value


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
    teacher: Annotated[list[Annotated[Teacher, OneOf(Teacher, "local")]], BeforeValidator(_as_list)] = Field(
        default=[], description="Who supervises; may be missing when no objective and no rollout asks a teacher"
    )
    prompts: Annotated[list[Annotated[Prompts, OneOf(Prompts, "file")]], BeforeValidator(_as_list)] = Field(
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
    shaping: Annotated[Shaping, OneOf(Shaping)] = Field(Uniform(), description="What a position weighs")
    objective: Annotated[list[Annotated[Objective, OneOf(Objective)]], BeforeValidator(_as_list)] = Field(
        default=[ReverseKL()], min_length=1, description="What a step descends; several are summed"
    )
    reduction: Reduction = Field("token_mean", description="How a step's losses become one number")
    update: Annotated[Update, OneOf(Update, "plain")] = Field(PlainUpdate(), description="How gradients become a step")
    batch: Batch = Field(Batch(), description="Trajectories of a step")
    evaluation: Evaluation = Field(Evaluation(), description="Held-out measurements")
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
        return value

    @model_validator(mode="after")
    def _one_modality(self) -> Recipe:
        student = self.student
        for key in type(self).model_fields:
            for part in nested(getattr(self, key)):
                if part.modality not in (None, student.modality):
                    axis = next(c for c in type(part).__mro__ if "axis" in vars(c))
                    fitting = [k for k, c in choices_of(axis).items() if c.modality in (None, student.modality)]
                    raise ValueError(
                        f"{key} {_kind(part)!r} is for {part.modality} models and student {_kind(student)!r} is of "
                        f"{student.modality}; {key} choices that fit: {', '.join(fitting) or 'none'}"
                    )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        names = [t.name for t in self.teacher if t.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers have the names {names}; each name must be its own")
        for part in nested(self.rollout):
            if isinstance(part, TeacherRollout) and not self.teacher:
                raise ValueError("key 'teacher' is required: rollout 'teacher' lets a teacher write")
            if isinstance(part, TeacherRollout) and part.teacher not in (None, *names):
                raise ValueError(
                    f"rollout.teacher is {part.teacher!r}{nearest(str(part.teacher), names)}; the recipe names "
                    f"{names or 'none'}: give that teacher a name"
                )
        for objective in self.objective:
            kind = objective.model_dump()["kind"]
            if objective.needs_teacher and not self.teacher:
                raise ValueError(f"key 'teacher' is required: objective {kind!r} compares the student with a teacher")
            if objective.teacher is not None and objective.teacher not in names:
                raise ValueError(
                    f"objective {kind!r} listens to teacher {objective.teacher!r}{nearest(objective.teacher, names)}; "
                    f"teachers with a name: {', '.join(names) or 'none'}. Set teacher.name"
                )
            if objective.needs_reward and self.verifier is None and not self.rollout.rewards:
                raise ValueError(f"key 'verifier' is required: objective {kind!r} learns from its verdicts")
            if objective.compares_group and self.batch.group == 1:
                raise ValueError(
                    f"batch.group is 1: objective {kind!r} compares the trajectories of one prompt and would learn "
                    "nothing; take 2 or more"
                )
        return self

    @model_validator(mode="after")
    def _does_what_it_says(self) -> Recipe:
        plain = [None if o.scheduled() else o.model_dump_json() for o in self.objective]
        twice = next((o for i, o in enumerate(self.objective) if plain[i] and plain[i] in plain[:i]), None)
        if twice is not None:
            raise ValueError(f"objective {_kind(twice)!r} is listed twice alike; list it once, with weight: 2")
        for key, parts in (("objective", self.objective), ("teacher", self.teacher)):
            weights = [part.weight for part in parts]
            if key == "teacher" and not all(objective.needs_teacher for objective in self.objective):
                continue
            if weights and not any(weights) and not any(isinstance(weight, Scheduled) for weight in weights):
                raise ValueError(f"{key}.weight is 0 wherever there is one: nothing would be learnt; give one a weight")
        if isinstance(self.curriculum, LengthLadder) and isinstance(self.rollout, MixtureRollout):
            # Its sources keep to their own lengths; elsewhere a rung's length is what counts.
            longest, shortest = self.curriculum.lengths[-1], min(part.budget for part in self.rollout.parts)
            if longest > shortest and not self.rollout.scheduled():
                raise ValueError(
                    f"curriculum.lengths goes up to {longest} and a source of the mixture to {shortest} tokens; raise "
                    "its max_new_tokens, or leave out the longer rungs"
                )
        return self

    @property
    def directory(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

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


def _kind(choice: Choice) -> str:
    return str(type(choice).model_fields["kind"].default)


def recipe_folder() -> Path:
    """Where the recipes that come with `opd` lie: in the wheel, or at the top of a checkout."""
    packaged = Path(__file__).parent / "_recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(reference: str) -> Path:
    """A path, or the name of a shipped recipe (`quickstart`, `recipes/quickstart.yaml`)."""
    path = Path(reference)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and path.parent.as_posix() in (".", "recipes"):
        return shipped[path.stem]
    raise RecipeError(
        f"no recipe {reference!r}{nearest(path.stem, shipped)}; give a YAML file or one of {', '.join(shipped)}"
    )


NOT_SUGGESTED = {"description", "try_next", "resume", "checkpoint", "failures", "tracking", "hardware", "push_to"}
NOT_DESCRIBED = NOT_SUGGESTED | {"name", "output", "seed"}
"""Keys that may change while a recipe's `try_next`, or its `description`, stays true."""


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe; every mistake is a `RecipeError` that names the key and the file."""
    path = find_recipe(reference)
    data = read_plain(read_text(path), path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this file holds {type(data).__name__}")
    for override in overrides:
        apply_override(data, override)
    changed = {override.partition("=")[0].split(".")[0] for override in overrides}
    for text, spoken_of in (("description", changed - NOT_DESCRIBED), ("try_next", changed - NOT_SUGGESTED)):
        # What was said of the recipe as it stands is not said of another one.
        if spoken_of and text not in changed:
            data.pop(text, None)
    return parse_recipe(data, str(path), path.parent)


def parse_recipe(data: dict[str, Any], origin: str = "recipe", folder: Path | None = None) -> Recipe:
    """Validate plain data; `folder` is where relative data files are looked for besides the working directory."""
    take_in()
    try:
        return Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise RecipeError(_explain(error, data, origin)) from None
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply to be a recipe") from None


def json_schema() -> str:
    """JSON Schema of recipes, for editors."""
    take_in()
    return json.dumps(Recipe.model_json_schema(), indent=2)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set the place that `key.of.several=value` names; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {_short(override)} is not of the form key=value, e.g. update.learning_rate=1e-4")
    try:
        value = read_plain(text, "the value")
    except RecipeError as error:
        raise RecipeError(f"override {_short(override)}: {error}") from None
    *parents, leaf = key.split(".")
    place: Any = data
    for part in parents:
        if isinstance(place, list):
            place = place[_index(part, place, override)]
            continue
        following = place.get(part)
        if isinstance(following, str):
            following = {"kind": following}
        if not isinstance(following, dict | list):
            following = {}
        place[part] = following
        place = following
    if isinstance(place, list):
        place[_index(leaf, place, override)] = value
    else:
        place[leaf] = value


def _index(part: str, items: list[Any], override: str) -> int:
    if not items:
        raise RecipeError(f"override {_short(override)}: {part!r} is an index into an empty list; give the whole list")
    if not part.isdecimal() or int(part) >= len(items):
        raise RecipeError(f"override {_short(override)}: {part!r} must be an index from 0 to {len(items) - 1}")
    return int(part)


def _explain(error: ValidationError, data: dict[str, Any], origin: str) -> str:
    """The first mistake in at most two lines: key, value, what is accepted, the fix; and how many more there are."""
    first = error.errors()[0]
    loc, kind = first["loc"], first["type"]
    key = _dotted(loc, data)
    more = error.error_count() - 1
    tail = f" ({more} more mistake{'s' if more > 1 else ''} in this recipe)" if more else ""
    if kind == "extra_forbidden":
        return f"{origin}: unknown key {key!r}{_meant(loc, key)}{tail}"
    if kind == "missing":
        return f"{origin}: key {key!r} is required and missing{tail}"
    value = _short(first.get("input"))
    if kind == "union_tag_invalid":
        expected = [e.strip(" '") for e in first["ctx"]["expected_tags"].split(",")]
        tag = first["ctx"]["tag"]
        place = _place_key(loc)
        if place and _names_a_place(tag):
            leaf = key.rsplit(".", 1)[-1]
            item = "-" if leaf.isdecimal() else f"{leaf}:"
            return f"{origin}: {key} is {_short(tag)}, which is no kind; write {item} {{{place}: {tag}}}{tail}"
        return f"{origin}: {key}.kind is {tag!r}{nearest(str(tag), expected)}; accepted: {', '.join(expected)}{tail}"
    if kind == "union_tag_not_found":
        return f"{origin}: {key} is {value}; it needs a 'kind', one of {', '.join(_kinds_at(loc))}{tail}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first.get("input"), date):
        message += "; quote what YAML takes for a date"
    if not loc:
        return f"{origin}: {message}{tail}"
    return f"{origin}: {key} is {value}: {message[:1].lower() + message[1:]}{tail}"


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(loc: Sequence[int | str], data: Any) -> str:
    """The key as the user writes it: pydantic's location without the tags of unions and the index of a lone item."""
    keys: list[str] = []
    place = data
    for part, is_tag in _walk(loc):
        if is_tag or (isinstance(part, int) and not isinstance(place, list)):
            continue
        keys.append(str(part))
        if isinstance(place, dict):
            place = place.get(part)
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
        else:
            place = None
    return ".".join(keys) or "(the recipe)"


def _walk(loc: Sequence[int | str]) -> Iterator[tuple[int | str, bool]]:
    """`(part, whether it is the tag of a union)` for each part of a location."""
    model: type[BaseModel] | None = Recipe
    kinds: dict[str, type[Choice]] = {}
    for part in loc:
        if isinstance(part, str) and part in kinds:
            model, kinds = kinds[part], {}
            yield part, True
            continue
        yield part, False
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model, kinds = _models_in(model.model_fields[part])


def _annotations(annotation: Any) -> Iterator[Any]:
    yield annotation
    for arg in get_args(annotation):
        yield from _annotations(arg)


def _axes_in(metadata: Sequence[Any]) -> Iterator[type[Choice]]:
    for item in metadata:
        if isinstance(item, OneOf):
            yield item.axis


def _models_in(info: Any) -> tuple[type[BaseModel] | None, dict[str, type[Choice]]]:
    """What a field holds: a settings block, or the choices of an axis."""
    found = [*info.metadata]
    for annotation in _annotations(info.annotation):
        found += getattr(annotation, "__metadata__", ())
        if isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Choice):
            return annotation, {}
    for axis in _axes_in(found):
        return None, choices_of(axis)
    return None, {}


def _fields_at(loc: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] | None = Recipe
    kinds: dict[str, type[Choice]] = {}
    for part in loc:
        if isinstance(part, int):
            continue
        if part in kinds:
            model, kinds = kinds[part], {}
        elif model is not None and part in model.model_fields:
            model, kinds = _models_in(model.model_fields[part])
    return list(model.model_fields) if model is not None else []


def _kinds_at(loc: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] | None = Recipe
    kinds: dict[str, type[Choice]] = {}
    for part in loc:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model, kinds = _models_in(model.model_fields[part])
    return list(kinds)


def _meant(loc: Sequence[int | str], key: str) -> str:
    """Which key was meant: the same word elsewhere in a recipe, or the nearest here, or what is accepted here."""
    valid, leaf = _fields_at(loc[:-1]), str(loc[-1])
    block = key.rsplit(".", 1)[0] + "." if "." in key else ""
    elsewhere = sorted((k for k in all_keys() if k.rsplit(".", 1)[-1] == leaf), key=lambda k: k.count("."))
    if elsewhere:
        shortest = [k for k in elsewhere if k.count(".") == elsewhere[0].count(".")]
        return f" (did you mean {' or '.join(repr(k) for k in shortest[:3])}?)"
    close = difflib.get_close_matches(leaf, valid, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {block + close[0]!r}?)"
    far = difflib.get_close_matches(leaf, {k.rsplit(".", 1)[-1]: k for k in reversed(all_keys())}, n=1, cutoff=0.8)
    if far:
        return f" (did you mean {next(k for k in all_keys() if k.rsplit('.', 1)[-1] == far[0])!r}?)"
    return f"; accepted here: {', '.join(valid)}"


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key that some recipe may use; choices within choices of the same axis are not looked into."""

    def keys(block: type[BaseModel], above: str, seen: frozenset[type[BaseModel]]) -> Iterator[str]:
        for name, info in block.model_fields.items():
            yield above + name
            model, kinds = _models_in(info)
            inner = [block for block in dict.fromkeys([model, *kinds.values()]) if block is not None]
            for part in inner:
                if part not in seen:
                    yield from keys(part, f"{above}{name}.", seen | set(inner))

    return tuple(sorted(dict.fromkeys(keys(Recipe, "", frozenset())), key=lambda k: k.count(".")))


def _place_key(loc: Sequence[int | str]) -> str | None:
    """The field that says where a choice of the axis at `loc` lies: a model, or a file of prompts."""
    model: type[BaseModel] | None = Recipe
    kinds: dict[str, type[Choice]] = {}
    for part in loc:
        if isinstance(part, str) and part in kinds:
            model, kinds = kinds[part], {}
        elif isinstance(part, str) and model is not None and part in model.model_fields:
            model, kinds = _models_in(model.model_fields[part])
    axes = {choice.axis for choice in kinds.values()}
    return "model" if axes & {Policy.axis, Teacher.axis} else "path" if Prompts.axis in axes else None


def _names_a_place(text: str) -> bool:
    return "/" in text or "." in text or text.startswith("package:") or Path(text).exists()


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """`(dotted key, value in a, value in b)` wherever two dumped recipes differ."""
    found: list[tuple[str, Any, Any]] = []
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


def default_threads() -> int:
    """Threads that torch should use when the recipe names none: the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
