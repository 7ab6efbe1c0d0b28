"""What a recipe for a language model will take: parameters, tokens, bytes, operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from opd.assembly import check_ids, or_skipped, written_alike
from opd.choice import kind_of, nested
from opd.distributions import Distribution
from opd.engines import RolloutEngine
from opd.errors import DataError, ModelError, OpdError
from opd.hardware import fast_in_bf16
from opd.language.attention import attention_of, check_attention, check_dtype
from opd.language.engines.base import ids_of
from opd.language.engines.cpu.packing import common_beginning
from opd.language.engines.in_process import InProcess
from opd.language.engines.layouts import TOLD, usual_layout
from opd.language.model import ModelSettings, is_own
from opd.language.plan_attention import PLAN_ATTENTION
from opd.language.plan_experts import PLAN_EXPERTS
from opd.language.rollout import SamplingSettings
from opd.language.student import check_words
from opd.operator import chunk_rows
from opd.plan.at_hand import prompts_at_hand, stores_not_here
from opd.plan.rehearsal import rehearse
from opd.plan.tokenizers import own_reader, own_tokenizers
from opd.planning import Shape, bytes_text, count_text, saved_bytes
from opd.policies.causal_lm import TrainedModel
from opd.prompts import Prompt
from opd.provenance import models_of, peak_memory_bytes
from opd.recipe import Recipe
from opd.remote.launch import FOLDER, servers_of
from opd.rollouts.base import Sampling
from opd.same_view import nothing_to_learn
from opd.teachers import Teacher
from opd.teachers.base import DebateSize
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.served import ServedTeacher
from opd.teachers.showing import ShowingTeacher
from opd.updates import Planned
from opd.watches import Watch


@dataclass(frozen=True)
class Drawing:
    """What it takes to draw a step's completions token by token, at most.

    Attributes:
        passes: over one token of as many rows as are drawn side by side.
        rows: of a pass.
        read: bytes that a pass reads: weights, keys and values.
        teraflops: of a pass.
        layers: of the model that draws.
    """

    passes: int
    rows: int
    read: int
    teraflops: float
    layers: int


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe; `memory` in bytes by part, `peak` their sum at the worst moment of a step."""

    recipe: str
    student: Shape
    teachers: tuple[Shape, ...]
    prompt_tokens: int
    completion_tokens: int
    trajectories: int
    memory: dict[str, int]
    teraflops: dict[str, float]
    steps: int
    notes: tuple[str, ...] = ()
    update: tuple[tuple[str, str], ...] = ()
    """What the update says of itself, by name: of a private one what it spends."""

    tokenizers: tuple[tuple[str, str], ...] = ()
    """Of teachers with a tokenizer of their own, by name, how texts compare under both."""

    rows: tuple[str, ...] = ()
    """How rows of unequal length share a pass, and what they attend with: the student, and the teachers' models."""

    drawing: Drawing | None = None
    """What a step's rollouts take of this process; None where it draws none."""

    on_card: Plan | None = None
    """The same on a card, where it was made for a CPU that the recipe does not name."""

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "student": self.student.as_dict(),
            "teachers": [t.as_dict() for t in self.teachers],
            "rows_share_a_pass": list(self.rows),
            "tokens_per_step": {
                "sampled": self.trajectories * self.completion_tokens,
                "scored_by_teachers": self.trajectories * (self.prompt_tokens + self.completion_tokens),
            },
            "memory_bytes": self.memory,
            "peak_memory_bytes": self.peak,
            "teraflops_per_step": self.teraflops,
            **({"update": dict(self.update)} if self.update else {}),
            **({"tokenizers": dict(self.tokenizers)} if self.tokenizers else {}),
            "notes": list(self.notes),
        }

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        models = [("student", self.student), *((f"teacher {i}", t) for i, t in enumerate(self.teachers))]
        yield (
            "models",
            [
                (f"{role}: {s.name}", f"{count_text(s.parameters)} parameters, {count_text(s.trainable)} trained")
                for role, s in models
            ],
        )
        yield "rows in a pass", [(role, told) for (role, _), told in zip(models, self.rows, strict=True)]
        yield (
            "a step, at most",
            [
                ("trajectories", str(self.trajectories)),
                ("prompt tokens of a trajectory", str(self.prompt_tokens)),
                ("sampled tokens", str(self.trajectories * self.completion_tokens)),
                *((f"{part}, TFLOP", f"{value:.3g}") for part, value in self.teraflops.items()),
                (
                    "whole run, sampled tokens",
                    count_text(self.steps * self.trajectories * self.completion_tokens),
                ),
            ],
        )
        if self.tokenizers:
            yield "tokenizers", list(self.tokenizers)
        if self.update:
            yield "update", list(self.update)
        yield (
            "memory at the peak of a step",
            [*((part, bytes_text(value)) for part, value in self.memory.items()), ("sum", bytes_text(self.peak))],
        )


def plan_language(recipe: Recipe, home: str | None = None) -> Plan:
    """The plan of a recipe for a language model; reads configurations, and prompts and tokenizer where they are at
    hand. `home` as in `make_plan`."""
    home = home or home_of(recipe)
    if not isinstance(recipe.student, TrainedModel):
        raise OpdError(f"opd check has no plan for student.kind {kind_of(recipe.student)!r} yet")
    notes = [*nothing_to_learn(recipe), *written_alike(recipe)]
    _check_attention(recipe)
    student = recipe.student.shape(notes)
    check_answers(recipe)
    voices = [(teacher, shapes) for teacher in recipe.teacher for shapes in teacher.voiced(student, notes)]
    teachers: list[Members] = [(teacher.name, shapes) for teacher, shapes in voices]
    check_ids(recipe, min(shape.vocabulary for shape in (student, *(s for _, shapes in teachers for s in shapes))))
    notes += [f"{each.told()}; it is not started here" for each in servers_of(recipe, recipe.directory / FOLDER)]
    notes += [part.told(student) for part in nested(recipe.rollout) if isinstance(part, RolloutEngine)]
    asked = [shapes for _, shapes in teachers if shapes]
    debates = [teacher.debate for teacher, shapes in voices if shapes]
    if unknown := [i for i in recipe.end_tokens or () if i >= student.vocabulary]:
        raise ModelError(f"end_tokens names {unknown[0]}; the student's ids end at {student.vocabulary - 1}")
    models = (student, *(shape for shapes in asked for shape in shapes))
    rows = tuple(_rows(recipe, shape, home) for shape in models)
    prompt, common, training = prompt_tokens(recipe, recipe.student.reader, notes)
    notes += stores_not_here(recipe)
    rehearse(recipe, notes)
    completion = max(recipe.rollout.budget, recipe.curriculum.longest or 0)
    trajectories = _trajectories(recipe)
    if recipe.rollout.most_read is not None:
        # What stands before a turn's reply is not in the rows; an episode may be as long as it is let.
        prompt, common = recipe.rollout.most_read, 0
        notes.append(
            f"an episode has up to {recipe.rollout.most_turns} turns, with up to {prompt} tokens before each reply: "
            "so many are counted"
        )
    # Every turn is another state, about which a debate is held anew.
    debated = trajectories if recipe.rollout.turnwise else recipe.batch.prompts
    sampled = _sampled_here(recipe, student, teachers)
    tokenizers = _tokenizers(recipe, [shape for shapes in asked for shape in shapes], notes)
    plan = Plan(
        recipe=recipe.name,
        student=student,
        teachers=tuple(shape for shapes in asked for shape in shapes),
        prompt_tokens=prompt,
        completion_tokens=completion,
        trajectories=trajectories,
        memory=_memory(recipe, home, student, teachers, debates, prompt, common, completion, notes),
        teraflops=_operations(student, asked, debates, debated, trajectories, prompt, completion, sampled),
        steps=recipe.steps,
        update=_of_update(recipe, training, notes),
        notes=tuple(dict.fromkeys(notes)),
        rows=rows,
        tokenizers=tokenizers,
        drawing=_drawing(recipe, home, student, teachers, prompt, completion, trajectories) if sampled else None,
    )
    if home != "cpu" or recipe.hardware.device != "auto":
        return plan
    there = _memory(recipe, "cuda", student, teachers, debates, prompt, common, completion, [])
    drawing = _drawing(recipe, "cuda", student, teachers, prompt, completion, trajectories) if sampled else None
    return replace(plan, on_card=replace(plan, memory=there, drawing=drawing))


def _tokenizers(recipe: Recipe, shapes: Sequence[Shape], notes: list[str]) -> tuple[tuple[str, str], ...]:
    """As `own_tokenizers`, of the prompts that are at hand; nothing where no teacher has a tokenizer of its own."""
    parts = [part for teacher in recipe.teacher for part in nested(teacher)]
    if not any(is_own(getattr(part, "tokenizer", None)) for part in parts):
        return ()
    found = prompts_at_hand(recipe, [])
    texts = [] if found is None else [text for prompt in found[0] if isinstance(text := prompt.view(), str)]
    try:
        assert isinstance(recipe.student, TrainedModel)
        reader = recipe.student.reader(True)
    except ModelError:
        return ()
    return own_tokenizers(recipe, reader, texts, shapes, notes)


def _of_update(recipe: Recipe, training: int | None, notes: list[str]) -> tuple[tuple[str, str], ...]:
    """What the update says of itself, where that hangs on no number of prompts that is not known."""
    if training is None:
        if recipe.update.private:
            notes.append("what the update spends hangs on the number of prompts, which are not read")
        return ()
    return tuple(recipe.update.told(Planned(training, recipe.batch.prompts, recipe.steps, recipe.directory)))


def home_of(recipe: Recipe) -> str:
    """The kind of device that a recipe computes on."""
    named = recipe.hardware.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if named == "auto" else torch.device(named).type


def _check_attention(recipe: Recipe) -> None:
    """Raise `ModelError` for an attention that a run could not use."""
    parts = [(role, part) for role in ("student", "teacher") for part in nested(getattr(recipe, role))]
    for role, part in parts:
        if isinstance(part, ModelSettings):
            check_attention(part.attention, f"{role}.attention", getattr(part, "device", None) or home_of(recipe))


def _rows(recipe: Recipe, shape: Shape, home: str) -> str:
    """How rows share a pass of a model, in words; raises `ModelError` where its attention knows not the dtype."""
    base = shape.model.get_base_model() if hasattr(shape.model, "get_base_model") else shape.model
    precision = recipe.hardware.precision
    in_bf16 = precision == "bf16" or (precision == "auto" and quick_in_bf16(home))
    attention = attention_of(base)
    check_dtype(attention, torch.bfloat16 if in_bf16 else next(base.parameters()).dtype, shape.name)
    return f"{TOLD[usual_layout(base, home)]}; attention {attention}"


def quick_in_bf16(home: str) -> bool:
    """`fast_in_bf16`; of a kind of device that is elsewhere the best is assumed."""
    return (home == "cuda" and not torch.cuda.is_available()) or fast_in_bf16(home)


Members = tuple[str | None, list[Shape]]
"""A teacher's name, and its models: one of them answers at each position."""


@dataclass(frozen=True)
class Foreseen:
    """A teacher of whom it is known before a run what it answers."""

    settings: Teacher
    answers: type[Distribution]


def check_answers(recipe: Recipe) -> None:
    """Raise what a run would of objectives, shapings and watches that what the teachers answer is not enough for, and
    of a temperature that they do not answer at."""
    foreseen = []
    for part in nested(recipe.teacher):
        if isinstance(part, Teacher):
            part.check_temperature(recipe.temperature)
    for teacher in recipe.teacher:
        answered = teacher.answered(recipe.student.answers)
        for kind, source in answered:
            for objective in recipe.objective:
                objective.check_accepts(kind, source)
        foreseen += [Foreseen(teacher, kind) for kind, _ in answered[:1]]
    if len(foreseen) < len(recipe.teacher):
        return  # of a store that lies elsewhere nothing is known
    device = recipe.hardware.device
    home = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    for shaping in recipe.shaping:
        shaping.check_teachers(foreseen)
    for part in nested(recipe.rollout):
        if isinstance(part, Watch):
            part.check_teachers(foreseen, home)


def prompt_tokens(recipe: Recipe, reader: Callable[[bool], InProcess], notes: list[str]) -> tuple[int, int, int | None]:
    """Mean length of a prompt, how many leading tokens all prompts have in common, and the number of training prompts
    where that is known; as the model reads them that `reader` makes: without weights, and of files on this machine
    alone where it is told so."""
    told = bool(notes)
    found = prompts_at_hand(recipe, notes)
    if found is None:
        return recipe.max_prompt_tokens, 0, None
    training, prompts = len(found[0]), [*found[0], *found[1]]
    try:
        language = reader(told)
    except ModelError:
        notes.append(f"no tokenizer at hand: prompts are taken to be max_prompt_tokens={recipe.max_prompt_tokens} long")
        return recipe.max_prompt_tokens, 0, training
    encoded = [ids_of(language.encode(prompt)) for prompt in prompts[:512]]
    notes += language.notes
    if not recipe.skip_bad_prompts:
        for prompt, ids in zip(prompts, encoded, strict=False):
            try:
                check_words(language, prompt, ids)
            except DataError as error:
                raise or_skipped([error]) from None
    lengths = [len(ids) for ids in encoded]
    too_long = [i for i, length in enumerate(lengths) if length > recipe.max_prompt_tokens]
    if too_long and not recipe.skip_bad_prompts:
        found_too_long = DataError(
            f"{prompts[too_long[0]].where}: the prompt has {lengths[too_long[0]]} tokens, more than max_prompt_tokens="
            f"{recipe.max_prompt_tokens}; shorten it or raise the limit"
        )
        raise or_skipped([found_too_long])
    notes.append(f"prompts are {sum(lengths) / len(lengths):.0f} tokens long on average, {max(lengths)} at most")
    _note_shown(recipe, language, prompts, notes)
    # Where the same ids stand for other pictures nothing is in common.
    common = 0 if language.reads_pictures else common_beginning(encoded)
    return round(sum(lengths) / len(lengths)), common, training


def _note_shown(recipe: Recipe, student: InProcess, prompts: Sequence[Prompt], notes: list[str]) -> None:
    """Say what teachers read besides the prompt: each at the first prompt that it answers for, with its own tokenizer
    and template.

    Raises:
        DataError: that prompt cannot be read so; with `skip_bad_prompts` the next one is looked at.
    """
    parts = list(nested(recipe.teacher))
    for part in parts:
        if not isinstance(part, ShowingTeacher) or not part.shows:
            continue
        name = models_of(part.model_dump())
        reader = student
        try:
            if isinstance(part, LocalTeacher | ServedTeacher):
                reader = own_reader(part) if isinstance(part, LocalTeacher) else part.reader(student)
        except OpdError as error:
            notes.append(f"teacher {name}: nothing is said of what it is shown besides the prompt ({error})")
            continue
        if reader.template != "chat":
            continue
        routers = (each for each in parts if isinstance(each, RoutedTeacher))
        router = next((each for each in routers if any(route is part for route in each.routes.values())), None)
        for prompt in prompts:
            try:
                if router is not None and router.routes[router.route(prompt)] is not part:
                    continue
                more = len(ids_of(reader.encode(*part.view(prompt)))) - len(ids_of(reader.encode(prompt, part.sees)))
            except DataError:
                if not recipe.skip_bad_prompts:
                    raise
                continue
            if more > 0:
                notes.append(
                    f"teacher {name} reads {more} tokens before a prompt that the student does not (teacher.system, "
                    "teacher.examples); a step's TFLOP leave them out, since all its rows share them"
                )
            elif more < 0:
                notes.append(
                    f"teacher {name} reads {-more} tokens less of a prompt than the student: its template writes a "
                    "text of its own where no system message stands, which teacher.system takes the place of"
                )
            break


def _trajectories(recipe: Recipe) -> int:
    """Most trajectories of a step."""
    return recipe.batch.prompts * recipe.batch.group * recipe.rollout.most_turns


def _memory(
    recipe: Recipe,
    home: str,
    student: Shape,
    teachers: Sequence[Members],
    debates: Sequence[DebateSize],
    prompt: int,
    common: int,
    completion: int,
    notes: list[str],
) -> dict[str, int]:
    assert isinstance(recipe.student, TrainedModel)
    size = student.size
    micro = min(recipe.batch.micro, _trajectories(recipe))
    # Packed rows hold a group's prompt and the common beginning once; padded batches hold all for every trajectory.
    on_cpu = home == "cpu"
    together = 1 if recipe.rollout.turnwise else recipe.batch.group
    prompts = -(-micro // together) if on_cpu else micro
    tokens = prompts * (prompt - common) + common + micro * completion if on_cpu else micro * (prompt + completion)
    positions = _trajectories(recipe) * completion
    rows = chunk_rows(student.vocabulary)
    parts = {
        "student weights": student.weight_bytes,
        "gradients": student.trainable * size,
        "optimiser state": 2 * student.trainable * size,
    }
    precision = recipe.hardware.precision
    if size > 2 and (precision == "bf16" or (precision == "auto" and quick_in_bf16(home))):
        parts["bfloat16 casts of weights"] = 2 * student.parameters
    samplers = list(_samplers(recipe, student, teachers))
    asked = [shapes for _, shapes in teachers if shapes]
    copied = sum(_copied(settings, shape, home) for settings, shape in samplers)
    if copied:
        parts["bfloat16 copy for rollouts"] = copied
    first = 0
    for members in asked:
        for i, shape in enumerate(members, start=first):
            if not shape.offload or on_cpu:
                parts[f"teacher {i} weights"] = shape.weight_bytes
        # Of several routes one answers at a position: at most all of them the widest.
        widest = max(shape.width * shape.size for shape in members)
        last = first + len(members) - 1
        who = f"teacher {first}" if first == last else f"teachers {first}-{last}"
        parts[f"{who} answers (hidden states)"] = positions * widest
        first = last + 1
    parts["activations of a micro-batch"] = _activations(recipe, student, tokens, notes)
    parts["loss operator: chunks"] = (3 + len(asked)) * 4 * rows * student.vocabulary
    layer = student.model.get_output_embeddings()
    head_trained = bool(layer is not None and layer.weight.requires_grad)
    parts["loss operator: gradients"] = (student.vocabulary * student.width * 4 if head_trained else 0) + (
        micro * completion * student.width * 4
    )
    if on_cpu:
        parts["Python and libraries"] = peak_memory_bytes()
    else:
        notes.append("device memory of the CUDA context itself is not counted")
    longest = prompt + max(completion, recipe.evaluation.longest or 0)
    drawn = max(recipe.batch.prompts * recipe.batch.group, recipe.evaluation.held_out * recipe.evaluation.k)
    # Samplers of several sources, and of evaluations, work one after the other.
    rollout = max(
        (
            _sampling(settings, shape, home, drawn, longest) + _watching(settings, teachers, drawn, prompt + completion)
            for settings, shape in samplers
        ),
        default=0,
    )
    # Experts in this process write one after the other, each as many texts at once as it scores.
    held = [
        min(size.rows, recipe.batch.prompts) * (prompt + size.longest) * shape.kv_bytes_per_token
        for size, members in zip(debates, asked, strict=True)
        for shape in members
        if size.rounds
    ]
    rollout = max(rollout, *held) if held else rollout
    training = sum(parts[k] for k in parts if k.startswith(("activations", "loss operator")))
    # A rollout and a training pass never hold their temporaries at the same time.
    if rollout > training:
        for key in [k for k in parts if k.startswith(("activations", "loss operator"))]:
            del parts[key]
        parts["rollout: keys, values, logits, packed weights"] = rollout
    if recipe.hardware.precision == "bf16":
        notes.append("activations are estimated at the weights' dtype; bf16 computing holds somewhat less")
    return parts


def _elsewhere(recipe: Recipe) -> bool:
    """Whether an engine that is not here writes."""
    return any(isinstance(part, RolloutEngine) and not part.here for part in nested(recipe.rollout))


def _sampled_here(recipe: Recipe, student: Shape, teachers: Sequence[Members]) -> bool:
    """Whether rollouts cost this process anything."""
    alone = _elsewhere(recipe) and not any(recipe.rollout.samplers(student, teachers))
    return bool(recipe.rollout.sampled) and not alone


def _samplers(recipe: Recipe, student: Shape, teachers: Sequence[Members]) -> Iterator[tuple[Sampling, Shape]]:
    """Who writes, with which settings: every source of the rollout, and the student for evaluations."""
    own = _elsewhere(recipe)
    for settings, shape in recipe.rollout.samplers(student, teachers):
        own = own or (settings is recipe.rollout and shape is student)
        yield settings, shape
    if not own:
        yield SamplingSettings(), student


def _copied(settings: Sampling, shape: Shape, device: str) -> int:
    """Bytes of the copy that a source samples from, if it keeps one."""
    wanted = settings.dtype == "bfloat16" or (settings.dtype == "auto" and quick_in_bf16(device))
    return 2 * shape.parameters if wanted and shape.size > 2 else 0


def _sampling(settings: Sampling, shape: Shape, device: str, drawn: int, longest: int) -> int:
    """Bytes of a rollout's own: keys and values, the distributions of one token, and on a CPU weights once more."""
    rows = min(settings.batch, drawn)
    copied, size = _copied(settings, shape, device), shape.size
    cache = rows * longest * shape.kv_bytes_per_token // (size // 2 if copied else 1)
    # What `opd.language.engines.cpu.prepacked` holds: at most the weights that are sampled from.
    packed = (copied or shape.weight_bytes) if device == "cpu" else 0
    return cache + 4 * rows * shape.vocabulary * 4 + packed


def _drawing(
    recipe: Recipe,
    home: str,
    student: Shape,
    teachers: Sequence[Members],
    prompt: int,
    completion: int,
    trajectories: int,
) -> Drawing:
    """Of the source that reads most; of several sources each writes its share of the trajectories."""
    found = []
    for settings, shape in [*recipe.rollout.samplers(student, teachers)] or [(SamplingSettings(), student)]:
        rows = min(settings.batch, trajectories)
        copied = _copied(settings, shape, home)
        kept = rows * (prompt + completion // 2) * shape.kv_bytes_per_token // (shape.size // 2 if copied else 1)
        found.append(
            Drawing(
                passes=-(-trajectories // rows) * completion,
                rows=rows,
                read=(copied or shape.weight_bytes) + kept,
                teraflops=2 * shape.parameters * rows / 1e12,
                layers=shape.layers,
            )
        )
    return max(found, key=lambda each: each.passes * each.read)


def _watching(settings: Sampling, teachers: Sequence[Members], drawn: int, longest: int) -> int:
    """Bytes of the keys and values that a model keeps which scores the rows while they are written."""
    rows = min(settings.batch, drawn)
    return rows * longest * max((shape.kv_bytes_per_token for shape in settings.scorers(teachers)), default=0)


def _activations(recipe: Recipe, student: Shape, tokens: int, notes: list[str]) -> int:
    """Bytes that autograd keeps for one forward pass of `tokens` tokens, counted on the meta device."""
    assert isinstance(recipe.student, TrainedModel)
    base = student.model.get_base_model() if hasattr(student.model, "get_base_model") else student.model
    probe = min(tokens, 512)
    ids = torch.zeros(1, probe, dtype=torch.int64, device="meta")
    fused = base.config._attn_implementation != "eager"
    base.config._experts_implementation = PLAN_EXPERTS
    mask = torch.zeros(1, 1, probe, probe, dtype=next(base.parameters()).dtype, device="meta")
    # A mask that is given is not looked into, as one that is made of positions is: meta tensors hold no numbers.
    ways: list[tuple[str, dict[str, Any]]] = [("eager", {}), ("eager", {"attention_mask": mask})]
    for attention, given in [(PLAN_ATTENTION, {}), *ways] if fused else ways:
        base.config._attn_implementation = attention
        forward = partial(base.get_decoder(), input_ids=ids, position_ids=ids, use_cache=False, **given)
        try:
            kept = saved_bytes(student.model, forward)
            break
        except Exception:
            # Architectures are other people's code; not each of them runs on the meta device.
            continue
    else:
        notes.append(f"{student.name}: its activations cannot be counted without running it; they are estimated")
        size = student.size
        linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]
        widths = sum(m.in_features + m.out_features for m in linear)
        kept = probe * size * (widths + 4 * student.layers * student.width)
    total = kept * tokens // probe
    if recipe.student.gradient_checkpointing:
        return total // student.layers + student.layers * tokens * student.width * 4
    return total


def _operations(
    student: Shape,
    teachers: Sequence[list[Shape]],
    debates: Sequence[DebateSize],
    prompts: int,
    trajectories: int,
    prompt: int,
    completion: int,
    sampled: bool,
) -> dict[str, float]:
    """Matrix-product operations of a step, attention left out: 2 per parameter and token forward, 4 backward. Of each
    of the `teachers`, `debates` says how much is written before it answers."""

    def body(shape: Shape) -> int:
        return shape.parameters - shape.vocabulary * shape.width

    tokens, scored = trajectories * (prompt + completion), trajectories * completion
    head = student.vocabulary * student.width
    # Of several routes one answers; at most it is always the largest.
    heads = sum(max(2 * shape.vocabulary * shape.width for shape in members) for members in teachers) * scored
    each = [max(2 * body(shape) for shape in members) for members in teachers]
    bodies = sum(one * (tokens + trajectories * size.transcript) for one, size in zip(each, debates, strict=True))
    debating = sum(one * prompts * size.tokens(prompt) for one, size in zip(each, debates, strict=True) if size.rounds)
    return {
        "rollout": 2 * (body(student) * tokens + head * scored) / 1e12 if sampled else 0.0,
        **({"debates": debating / 1e12} if debating else {}),
        "teachers": bodies / 1e12,
        "student forward and backward": 6 * body(student) * tokens / 1e12,
        "loss operator": (6 * head * scored + heads) / 1e12,
    }
