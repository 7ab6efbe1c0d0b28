"""Does a recipe fit, and how long does it take? Estimates from its plan and from what a device is capable of: of this
machine that is measured in about a second, of cards that are elsewhere it is their makers' data sheets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from opd.choice import nested
from opd.hardware import absent
from opd.plan import ActionPlan, DrafterPlan, FlowPlan, Plan, make_plan
from opd.plan.language import home_of, quick_in_bf16
from opd.planning import bytes_text
from opd.recipe import Recipe
from opd.teachers.local import ScoringSettings

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a device is capable of.

    Attributes:
        memory: in bytes.
        operations: of matrix products, a second, in the dtype that a run computes in.
        reading: bytes of weights and caches a second, while tokens are drawn one by one.
        starting: seconds that a layer takes of a pass however little there is to compute.
        taken: bytes that a device's own context takes.
    """

    name: str
    memory: int
    operations: float
    reading: float
    starting: float
    taken: int = 0


REACHED, READ, STARTING = 0.4, 0.6, 4e-4
"""Of a data sheet's operations and bytes a second what a run is taken to reach, and the seconds in which Python starts
the kernels of a layer."""
CONTEXT = 600 * 2**20


def _card(name: str, memory: float, teraflops: float, reading: float) -> Device:
    """Of a data sheet: GiB, dense bfloat16 TFLOP a second, GB a second."""
    return Device(name, int(memory * GIB), REACHED * teraflops * 1e12, READ * reading * 1e9, STARTING, CONTEXT)


CARDS = (
    _card("L4, 24 GiB", 24, 121, 300),
    _card("RTX 4090, 24 GiB", 24, 165, 1008),
    _card("A100, 40 GiB", 40, 312, 1555),
    _card("L40S, 48 GiB", 48, 362, 864),
    _card("A100, 80 GiB", 80, 312, 2039),
    _card("H100, 80 GiB", 80, 989, 3350),
    _card("H200, 141 GB", 131, 989, 4800),
    _card("B200, 192 GB", 179, 2250, 8000),
)
"""Makers' figures."""


def this_machine(recipe: Recipe, plan: Plan | None) -> Device:
    """The device that the recipe would compute on here, measured with matrices of the plan's student. Without a plan
    its memory alone is told."""
    home = home_of(recipe)
    device = torch.device(recipe.hardware.device if recipe.hardware.device != "auto" else home)
    if home == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, memory, taken = found.name, found.total_memory, CONTEXT
    else:
        name, memory, taken = home, psutil.virtual_memory().total, 0
    if plan is None:
        return Device(name, memory, 0.0, 0.0, 0.0, taken)
    precision = recipe.hardware.precision
    bf16 = plan.student.size == 2 or precision == "bf16" or (precision == "auto" and quick_in_bf16(home))
    threads = torch.get_num_threads()
    try:
        if recipe.hardware.threads is not None:
            torch.set_num_threads(recipe.hardware.threads)
        rows = plan.drawing.rows if plan.drawing is not None else 1
        operations, reading = _products(device, plan.student.width, bf16), _reading(device, plan.student.width, rows)
        starting = _starting(device)
    finally:
        torch.set_num_threads(threads)
    return Device(name, memory, operations, reading, starting, taken)


WIDEST, TOGETHER, SLOW = 1024, 2**27, 0.1
"""Wider matrices are as quick and take longer; bytes of the weights of a pass; seconds of a call that is not repeated,
as where a processor emulates bfloat16."""


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of a call, of five or as many as fit into a fifth of a second after one that warms up: what others take
    of the machine at the moment is no part of it. A slow call is made once."""

    def timed() -> float:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    first = timed()
    if first > SLOW:
        return first
    found = [timed()]
    while len(found) < 5 or sum(found) < 0.2:
        found.append(timed())
    return min(found)


def _products(device: torch.device, width: int, bf16: bool) -> float:
    """Operations a second of a layer's products: forward, and both of the backward pass."""
    width = min(width, WIDEST)
    dtype = torch.bfloat16 if bf16 else torch.float32
    rows = torch.randn(128, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, 4 * width, device=device, dtype=dtype, requires_grad=True)
    work = 3 * 2 * rows.shape[0] * weight.numel()
    return work / _seconds(lambda: (rows @ weight).sum().backward(), device)


def _reading(device: torch.device, width: int, rows: int) -> float:
    """Bytes of weights a second in passes over one token of each row; together the weights fit into no cache."""
    width = min(width, WIDEST)
    weights = [torch.randn(width, 4 * width, device=device) for _ in range(min(64, TOGETHER // (16 * width * width)))]
    token = torch.randn(rows, width, device=device)
    read = sum(4 * weight.numel() for weight in weights)
    with torch.no_grad():
        return read / _seconds(lambda: [token @ weight for weight in weights], device)


OPERATIONS = 24
"""Small operations of a layer that are no matrix products: norms, rotations, masks, sums."""


def _starting(device: torch.device) -> float:
    """Seconds of a layer's small operations."""
    token = torch.randn(1, 64, device=device)

    def work() -> None:
        for _ in range(OPERATIONS):
            token.mul(1.0)

    with torch.no_grad():
        return _seconds(work, device)


def seconds_of(plan: Plan, recipe: Recipe, device: Device) -> dict[str, float]:
    """Seconds of a step by part, at most: as if every completion had its whole length."""
    found = {part: 1e12 * value / device.operations for part, value in plan.teraflops.items() if part != "rollout"}
    passes = -(-plan.trajectories // recipe.batch.micro)
    if getattr(recipe.student, "gradient_checkpointing", False):
        found["student forward and backward"] *= 4 / 3
    found["student forward and backward"] += 3 * passes * plan.student.layers * device.starting
    # Weights, gradients and both moments are read, and all but gradients written.
    found["update"] = 7 * plan.student.trainable * plan.student.size / device.reading
    if plan.drawing is None:
        return found
    drawing, read = plan.drawing, 1e12 * plan.teraflops["rollout"] / device.operations
    prompts = read * plan.prompt_tokens / max(1, plan.prompt_tokens + plan.completion_tokens)
    each = max(drawing.read / device.reading, 1e12 * drawing.teraflops / device.operations)
    each += drawing.layers * device.starting
    return {"rollout": prompts + drawing.passes * each, **found}


@dataclass(frozen=True)
class Fit:
    """One device's answer: `peak` bytes that a step needs there; `step` seconds by part, where they can be told."""

    device: Device
    peak: int
    step: dict[str, float]
    steps: int

    @property
    def room(self) -> int:
        return self.device.memory - self.device.taken - self.peak

    @property
    def verdict(self) -> str:
        if self.room < 0:
            return "does not fit"
        return "fits" if self.room >= self.peak // 4 else "tight"

    def told(self) -> str:
        needed = f"{self.verdict}: {bytes_text(self.peak)} of {bytes_text(self.device.memory)}"
        if not self.step or self.room < 0:
            return needed
        seconds = sum(self.step.values())
        return f"{needed}; a step {time_text(seconds)}, the run {time_text(seconds * self.steps)}"

    def as_dict(self) -> dict[str, Any]:
        timed = {"seconds_per_step": self.step, "seconds": sum(self.step.values()) * self.steps} if self.step else {}
        return {"device": self.device.name, "verdict": self.verdict, "peak_memory_bytes": self.peak, **timed}


@dataclass(frozen=True)
class Estimate:
    """Where a recipe fits and how long it takes: here, unless it names a device that this machine has not, and on cards
    that are elsewhere."""

    here: Fit | None
    cards: tuple[Fit, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        here = None if self.here is None else self.here.as_dict()
        return {"here": here, "cards": [fit.as_dict() for fit in self.cards]}

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        here = [] if self.here is None else [(f"this machine: {self.here.device.name}", self.here.told())]
        rows = here + [(fit.device.name, fit.told()) for fit in self.cards]
        if rows:
            yield "does it fit, and how long, at most (an estimate)", rows
        if self.here is not None and self.here.step and self.here.room >= 0:
            whole = sum(self.here.step.values())
            yield (
                "a step here, at most (an estimate)",
                [
                    (part, f"{time_text(value)}, {value / whole:.0%}")
                    for part, value in self.here.step.items()
                    if value > 0
                ],
            )


def estimate(recipe: Recipe, plan: Plan | FlowPlan | ActionPlan | DrafterPlan) -> Estimate:
    """Where `recipe` fits and how long it takes. This machine is measured for about a second, if it has the device that
    the recipe names; else the plan is one for such a device, and a note says that a run is refused here."""
    timed = plan if isinstance(plan, Plan) else None
    elsewhere = absent(recipe.hardware.device, "hardware.device")
    here = None if elsewhere is not None else _fit(recipe, plan, this_machine(recipe, timed))
    cards: tuple[Fit, ...] = ()
    if home_of(recipe) == "cuda":
        cards = () if elsewhere is None else tuple(_fit(recipe, plan, card) for card in CARDS)
    elif recipe.hardware.device == "auto":
        there = (timed.on_card if timed is not None else None) or make_plan(recipe, "cuda")
        cards = tuple(_fit(recipe, there, card) for card in CARDS)
    named = [(part.device, "teacher.device") for part in nested(recipe.teacher) if isinstance(part, ScoringSettings)]
    told = dict.fromkeys([elsewhere, *(absent(device, key) for device, key in named)])
    notes = [f"planned for a machine that has it, a run here is refused: {why}" for why in told if why is not None]
    if here is not None and here.room < 0:
        part, value = max(plan.memory.items(), key=lambda item: item[1])
        notes.append(
            f"this recipe needs {bytes_text(here.peak)} and this machine has {bytes_text(here.device.memory)}; the "
            f"largest part is {part!r} with {bytes_text(value)}: {_less(part)}"
        )
    return Estimate(here, cards, tuple(notes))


def _fit(recipe: Recipe, plan: Plan | FlowPlan | ActionPlan | DrafterPlan, device: Device) -> Fit:
    step = seconds_of(plan, recipe, device) if isinstance(plan, Plan) else {}
    return Fit(device, sum(plan.memory.values()), step, recipe.steps)


LESS = {
    "activations": "lower batch.micro, which changes no gradient, or set student.gradient_checkpointing",
    "rollout": "lower rollout.batch, or rollout.max_new_tokens",
    "teacher": "put the teacher behind a server, or set its dtype to bfloat16",
    "optimiser": "set student.lora, which trains few weights",
    "gradients": "set student.lora, which trains few weights",
    "student": "set student.dtype to bfloat16, or take a smaller student",
}


def _less(part: str) -> str:
    return next((advice for name, advice in LESS.items() if part.startswith(name)), "lower batch.micro")


def time_text(seconds: float) -> str:
    """As a person says it: two figures are enough for an estimate."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 99.5 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"
