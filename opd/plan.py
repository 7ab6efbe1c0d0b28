"""What a recipe will take, from configurations on the meta device: parameters, tokens, bytes, operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opd.choice import kind_of
from opd.divergences.operator import chunk_rows
from opd.errors import DataError, ModelError, OpdError, first_line
from opd.flow.plan import FlowPlan, make_flow_plan
from opd.hardware import fast_in_bf16
from opd.language.model import LanguageModel, ModelSettings, load_config, load_tokenizer
from opd.language.packing import common_beginning
from opd.language.plan_attention import PLAN_ATTENTION
from opd.language.plan_experts import PLAN_EXPERTS
from opd.planning import bytes_text, count_text, prompts_at_hand, saved_bytes
from opd.policies.causal_lm import CausalLM, _with_lora, freeze
from opd.policies.flow_transformer import FlowTransformer
from opd.provenance import peak_memory_bytes
from opd.recipe import Recipe
from opd.rollouts import Rollout
from opd.rollouts.stored import StoredRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.same_view import nothing_to_learn
from opd.store import Store, Targets
from opd.store.targets import ANSWERS
from opd.teachers import Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.self_teacher import SelfTeacher
from opd.teachers.stored import StoredTeacher

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """One model as its configuration describes it."""

    name: str
    parameters: int
    trainable: int
    width: int
    vocabulary: int
    layers: int
    kv_bytes_per_token: int
    weight_bytes: int
    model: Any = field(repr=False, compare=False)


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

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        def shape(s: Shape) -> dict[str, Any]:
            return {k: v for k, v in vars(s).items() if k != "model"}

        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "student": shape(self.student),
            "teachers": [shape(t) for t in self.teachers],
            "tokens_per_step": {
                "sampled": self.trajectories * self.completion_tokens,
                "scored_by_teachers": self.trajectories * (self.prompt_tokens + self.completion_tokens),
            },
            "memory_bytes": self.memory,
            "peak_memory_bytes": self.peak,
            "teraflops_per_step": self.teraflops,
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
        yield (
            "memory at the peak of a step",
            [*((part, bytes_text(value)) for part, value in self.memory.items()), ("sum", bytes_text(self.peak))],
        )


def make_plan(recipe: Recipe) -> Plan | FlowPlan:
    """The plan of `recipe`; reads configurations, and prompts and tokenizer where they are at hand."""
    if isinstance(recipe.student, FlowTransformer):
        return make_flow_plan(recipe)
    if not isinstance(recipe.student, CausalLM):
        raise OpdError(f"opd check has no plan for student.kind {kind_of(recipe.student)!r} yet")
    notes = nothing_to_learn(recipe)
    student = _shape(recipe.student, notes, trainable=True)
    teachers = [found for teacher in recipe.teacher if (found := _members(teacher, recipe, student, notes))]
    if unknown := [i for i in recipe.end_tokens or () if i >= student.vocabulary]:
        raise ModelError(f"end_tokens names {unknown[0]}; the student's ids end at {student.vocabulary - 1}")
    prompt, common = _prompt_tokens(recipe, notes)
    completion = max([recipe.rollout.budget, *getattr(recipe.curriculum, "lengths", ())])
    trajectories = recipe.batch.prompts * recipe.batch.group
    return Plan(
        recipe=recipe.name,
        student=student,
        teachers=tuple(shape for members in teachers for _, shape in members),
        prompt_tokens=prompt,
        completion_tokens=completion,
        trajectories=trajectories,
        memory=_memory(recipe, student, teachers, prompt, common, completion, notes),
        teraflops=_operations(
            student, teachers, trajectories, prompt, completion, isinstance(recipe.rollout, StoredRollout)
        ),
        steps=recipe.steps,
        notes=tuple(dict.fromkeys(notes)),
    )


Members = list[tuple[Teacher, Shape]]
"""Those of whom one answers at each position: the models of one teacher of the recipe."""


def _members(teacher: Teacher, recipe: Recipe, student: Shape, notes: list[str]) -> Members:
    if isinstance(teacher, RoutedTeacher):
        return [
            (settings, replace(shape, name=f"{shape.name} for {tag}"))
            for tag, route in teacher.routes.items()
            for settings, shape in _members(route, recipe, student, notes)
        ]
    if isinstance(teacher, StoredTeacher):
        notes.append(f"{teacher.path}: its answers are read from the disk, {_store_note(teacher, recipe)}")
        return []
    for objective in recipe.objective:
        objective.check_accepts(_answers(), "the teacher")
    if isinstance(teacher, LocalTeacher):
        return [(teacher, _shape(teacher, notes, trainable=False))]
    if isinstance(teacher, SelfTeacher):
        return [(teacher, replace(student, name=f"{student.name} ({teacher.mode} copy)", trainable=0))]
    return []


def _answers() -> Any:
    from opd.distributions import Categorical

    return Categorical


def _store_note(teacher: StoredTeacher, recipe: Recipe) -> str:
    """What is known of stored targets before a run; raises when an objective cannot be computed from them."""
    if not (Path(teacher.path) / "store.json").is_file():
        return "and it is not on this machine"
    targets = Targets.open(Store.open(teacher.path), teacher.targets)
    for objective in recipe.objective:
        objective.check_accepts(ANSWERS[targets.header.kind], "the store")
    return f"kind {targets.header.kind}"


def _shape(settings: ModelSettings, notes: list[str], trainable: bool) -> Shape:
    config = load_config(settings, notes)
    dtype = settings.dtype if settings.dtype != "auto" else str(getattr(config, "dtype", None) or "float32")
    dtype = dtype.removeprefix("torch.")
    model = _empty(settings, config, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"model {settings.model!r} has no output embeddings: not a causal language model")
    vocabulary, width = head.weight.shape
    size = DTYPE_BYTES.get(dtype, 4)
    text = config.get_text_config()
    return Shape(
        name=settings.model,
        parameters=parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) if trainable else 0,
        width=width,
        vocabulary=vocabulary,
        layers=text.num_hidden_layers,
        kv_bytes_per_token=_kv_width(model, text) * size,
        weight_bytes=parameters * size,
        model=model,
    )


def _empty(settings: ModelSettings, config: Any, dtype: str) -> Any:
    """The model on the meta device, with its adapters and frozen parts."""
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, dtype, torch.float32),
                attn_implementation=settings.attention,
                trust_remote_code=settings.trust_remote_code,
            )
    except Exception as error:
        # A configuration runs the architecture's own code, which may raise anything about its numbers.
        raise ModelError(
            f"model {settings.model!r}: transformers makes no causal language model of its config.json "
            f"({first_line(error)}); choose another model, or mend the file"
        ) from None
    if isinstance(settings, CausalLM) and settings.lora is not None:
        model = _with_lora(model, settings.lora)
    if isinstance(settings, CausalLM):
        freeze(model, settings.freeze)
    return model


def _kv_width(model: Any, config: Any) -> int:
    """Numbers that a sampler keeps of each token: keys and values of the layers that attend."""
    found = [
        getattr(part, name).out_features  # an adapted layer has it too
        for part in model.modules()
        for name in ("k_proj", "v_proj")
        if hasattr(getattr(part, name, None), "out_features")
    ]
    if found:
        return sum(found)
    count = getattr(config, "num_attention_heads", None)
    if count is None:  # nothing attends, and a state of one size is kept
        return 0
    heads = getattr(config, "num_key_value_heads", None) or count
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // count
    return int(2 * config.num_hidden_layers * heads * head_dim)


def _prompt_tokens(recipe: Recipe, notes: list[str]) -> tuple[int, int]:
    """Mean length of a prompt, and how many leading tokens all prompts have in common."""
    prompts = prompts_at_hand(recipe, notes)
    if prompts is None:
        return recipe.max_prompt_tokens, 0
    assert isinstance(recipe.student, CausalLM)
    try:
        tokenizer = load_tokenizer(recipe.student, local_only=bool(notes))
    except ModelError:
        notes.append(f"no tokenizer at hand: prompts are taken to be max_prompt_tokens={recipe.max_prompt_tokens} long")
        return recipe.max_prompt_tokens, 0
    language = LanguageModel(None, tokenizer, recipe.student.template, recipe.student.template_options)
    encoded = [language.encode(prompt) for prompt in prompts[:512]]
    lengths = [len(ids) for ids in encoded]
    too_long = [i for i, length in enumerate(lengths) if length > recipe.max_prompt_tokens]
    if too_long and not recipe.skip_bad_prompts:
        raise DataError(
            f"{prompts[too_long[0]].where}: the prompt has {lengths[too_long[0]]} tokens, more than max_prompt_tokens="
            f"{recipe.max_prompt_tokens}; shorten it or raise the limit"
        )
    notes.append(f"prompts are {sum(lengths) / len(lengths):.0f} tokens long on average, {max(lengths)} at most")
    return round(sum(lengths) / len(lengths)), common_beginning(encoded)


def _memory(
    recipe: Recipe, student: Shape, teachers: list[Members], prompt: int, common: int, completion: int, notes: list[str]
) -> dict[str, int]:
    assert isinstance(recipe.student, CausalLM)
    size = student.weight_bytes // student.parameters
    micro = min(recipe.batch.micro, recipe.batch.prompts * recipe.batch.group)
    # Packed rows hold a group's prompt and the common beginning once; padded batches hold all for every trajectory.
    on_cpu = recipe.hardware.device == "cpu" or not torch.cuda.is_available()
    prompts = -(-micro // recipe.batch.group) if on_cpu else micro
    tokens = prompts * (prompt - common) + common + micro * completion if on_cpu else micro * (prompt + completion)
    positions = recipe.batch.prompts * recipe.batch.group * completion
    rows = chunk_rows(student.vocabulary)
    parts = {
        "student weights": student.weight_bytes,
        "gradients": student.trainable * size,
        "optimiser state": 2 * student.trainable * size,
    }
    device = "cpu" if on_cpu else "cuda"
    precision = recipe.hardware.precision
    if size > 2 and (precision == "bf16" or (precision == "auto" and fast_in_bf16(device))):
        parts["bfloat16 casts of weights"] = 2 * student.parameters
    samplers = list(_samplers(recipe, student, teachers))
    copied = sum(_copied(settings, shape, device) for settings, shape in samplers)
    if copied:
        parts["bfloat16 copy for rollouts"] = copied
    first = 0
    for members in teachers:
        for i, (settings, shape) in enumerate(members, start=first):
            if not getattr(settings, "offload", False) or on_cpu:
                parts[f"teacher {i} weights"] = shape.weight_bytes
        # Of several routes one answers at a position: at most all of them the widest.
        widest = max(shape.width * (shape.weight_bytes // shape.parameters) for _, shape in members)
        last = first + len(members) - 1
        who = f"teacher {first}" if first == last else f"teachers {first}-{last}"
        parts[f"{who} answers (hidden states)"] = positions * widest
        first = last + 1
    parts["activations of a micro-batch"] = _activations(recipe, student, tokens, notes)
    parts["loss operator: chunks"] = (3 + len(teachers)) * 4 * rows * student.vocabulary
    layer = student.model.get_output_embeddings()
    head_trained = bool(layer is not None and layer.weight.requires_grad)
    parts["loss operator: gradients"] = (student.vocabulary * student.width * 4 if head_trained else 0) + (
        micro * completion * student.width * 4
    )
    if on_cpu:
        parts["Python and libraries"] = peak_memory_bytes()
    else:
        notes.append("device memory of the CUDA context itself is not counted")
    longest = prompt + max(completion, recipe.evaluation.max_new_tokens or 0)
    drawn = max(recipe.batch.prompts * recipe.batch.group, recipe.evaluation.held_out * recipe.evaluation.k)
    # Samplers of several sources, and of evaluations, work one after the other.
    rollout = max(_sampling(settings, shape, device, drawn, longest) for settings, shape in samplers)
    training = sum(parts[k] for k in parts if k.startswith(("activations", "loss operator")))
    # A rollout and a training pass never hold their temporaries at the same time.
    if rollout > training:
        for key in [k for k in parts if k.startswith(("activations", "loss operator"))]:
            del parts[key]
        parts["rollout: keys, values, logits, packed weights"] = rollout
    if recipe.hardware.precision == "bf16":
        notes.append("activations are estimated at the weights' dtype; bf16 computing holds somewhat less")
    return parts


def _samplers(
    recipe: Recipe, student: Shape, teachers: list[Members]
) -> Iterator[tuple[StudentRollout | TeacherRollout, Shape]]:
    """Who writes, with which settings: every source of the rollout, and the student for evaluations."""

    def sources(rollout: Rollout) -> Iterator[tuple[StudentRollout | TeacherRollout, Shape]]:
        for part in rollout.parts:
            yield from sources(part)
        if isinstance(rollout, StudentRollout):
            yield rollout, student
        if isinstance(rollout, TeacherRollout):
            by_name = {teacher.name: members for teacher, members in zip(recipe.teacher, teachers, strict=False)}
            named = by_name.get(rollout.teacher) if rollout.teacher is not None else None
            for _, shape in named or next(iter(teachers), []):
                yield rollout, shape

    yield from sources(recipe.rollout)
    if not isinstance(recipe.rollout, StudentRollout):
        yield StudentRollout(), student


def _copied(settings: StudentRollout | TeacherRollout, shape: Shape, device: str) -> int:
    """Bytes of the copy that a source samples from, if it keeps one."""
    wanted = settings.dtype == "bfloat16" or (settings.dtype == "auto" and fast_in_bf16(device))
    return 2 * shape.parameters if wanted and shape.weight_bytes // shape.parameters > 2 else 0


def _sampling(settings: StudentRollout | TeacherRollout, shape: Shape, device: str, drawn: int, longest: int) -> int:
    """Bytes of a rollout's own: keys and values, the distributions of one token, and on a CPU weights once more."""
    rows = min(settings.batch, drawn)
    copied, size = _copied(settings, shape, device), shape.weight_bytes // shape.parameters
    cache = rows * longest * shape.kv_bytes_per_token // (size // 2 if copied else 1)
    # What `opd.prepacked` holds: at most the weights that are sampled from.
    packed = (copied or shape.weight_bytes) if device == "cpu" else 0
    return cache + 4 * rows * shape.vocabulary * 4 + packed


def _activations(recipe: Recipe, student: Shape, tokens: int, notes: list[str]) -> int:
    """Bytes that autograd keeps for one forward pass of `tokens` tokens, counted on the meta device."""
    assert isinstance(recipe.student, CausalLM)
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
        size = student.weight_bytes // student.parameters
        linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]
        widths = sum(m.in_features + m.out_features for m in linear)
        kept = probe * size * (widths + 4 * student.layers * student.width)
    total = kept * tokens // probe
    if recipe.student.gradient_checkpointing:
        return total // student.layers + student.layers * tokens * student.width * 4
    return total


def _operations(
    student: Shape, teachers: list[Members], trajectories: int, prompt: int, completion: int, stored: bool
) -> dict[str, float]:
    """Matrix-product operations of a step, attention left out: 2 per parameter and token forward, 4 backward."""

    def body(shape: Shape) -> int:
        return shape.parameters - shape.vocabulary * shape.width

    tokens, scored = trajectories * (prompt + completion), trajectories * completion
    head = student.vocabulary * student.width
    # Of several routes one answers; at most it is always the largest.
    heads = sum(max(2 * shape.vocabulary * shape.width for _, shape in members) for members in teachers) * scored
    bodies = sum(max(2 * body(shape) for _, shape in members) for members in teachers) * tokens
    return {
        "rollout": 0.0 if stored else 2 * (body(student) * tokens + head * scored) / 1e12,
        "teachers": bodies / 1e12,
        "student forward and backward": 6 * body(student) * tokens / 1e12,
        "loss operator": (6 * head * scored + heads) / 1e12,
    }
