"""One step of an optimiser a batch, with gradient clipping, through `accelerate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from pydantic import Field, model_validator

from opd.choice import Settings
from opd.errors import RecipeError, RunError
from opd.objectives import Loss
from opd.policies.base import Student
from opd.schedules import OverSteps
from opd.sharding import full, like, settle_root, skeleton
from opd.updates.base import Optimiser, Update
from opd.updates.optimizers import MOMENTUM, SHARDED, Kind, make_optimizer
from opd.weights import copy_into

Beta = Annotated[float, Field(ge=0, lt=1)]


COUNTED = ("k", "lr_max", "weight_sum")
"""What a schedule-free optimiser counts in its groups."""


class Average(Settings):
    """A running mean of the student's weights: `mean <- decay * mean + (1 - decay) * weights`."""

    decay: float = Field(0.9, gt=0, lt=1, description="Share of the mean that a step keeps")
    every: int = Field(8, ge=1, description="Updates between two looks at the weights")


class PlainUpdate(Update):
    """One optimiser step per batch.

    `adamw`, `sgd` and `muon` are torch's; Muon takes the matrices inside the model, AdamW the rest, at one learning
    rate. `adamw_8bit` (of the package bitsandbytes) keeps AdamW's moments in 8 bits. `schedule_free` (of schedulefree)
    needs no schedule of the learning rate: it trains at one point, and a mean of the weights is measured and saved.
    """

    kind: Literal["plain"] = "plain"
    optimizer: Kind = Field("adamw", description="What makes a step of a gradient")
    learning_rate: Annotated[float, OverSteps(ge=0)] = Field(1e-5, description="Of the optimiser")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled from the gradient, except with sgd")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Of AdamW and its kin")
    momentum: Beta | None = Field(None, description="Of sgd (default 0.9) and muon (default 0.95)")
    clip_norm: float | None = Field(1.0, gt=0, description="Largest norm of the gradient; null never clips")
    average: Average | None = Field(
        None, description="Measure and save a running mean of the weights; training goes on with the weights themselves"
    )

    @model_validator(mode="after")
    def _all_is_used(self) -> PlainUpdate:
        if self.momentum is not None and self.optimizer not in MOMENTUM:
            raise ValueError(f"momentum is a setting of {' and '.join(MOMENTUM)}; {self.optimizer} has betas")
        if self.optimizer == "sgd" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError("sgd has no betas; set momentum")
        if self.optimizer == "schedule_free" and self.average is not None:
            raise ValueError("schedule_free measures and saves a mean of the weights itself; leave average out")
        return self

    def build(self, student: Student, accelerator: Accelerator) -> PlainOptimiser:
        return PlainOptimiser(self, student, accelerator)


class PlainOptimiser(Optimiser):
    """The built update."""

    def __init__(self, settings: PlainUpdate, student: Student, accelerator: Accelerator):
        self.settings, self.accelerator, self.student = settings, accelerator, student
        if accelerator.is_fsdp2 and settings.optimizer not in SHARDED:
            raise RecipeError(
                f"update.optimizer is {settings.optimizer!r}, and with FSDP2 weights are sharded; take "
                f"{' or '.join(SHARDED)}, or plain data parallelism"
            )
        optimizer = make_optimizer(
            settings.optimizer,
            student.module,
            rate=float(settings.learning_rate),
            decay=settings.weight_decay,
            betas=settings.betas,
            momentum=settings.momentum,
        )
        if accelerator.is_fsdp2:
            if not student.shards:
                raise RecipeError(
                    f"FSDP2 shards language models only, not {type(student).__name__}; take plain data parallelism"
                )
            if settings.average is not None:
                raise RecipeError(
                    "update.average keeps a mean of whole weights, and FSDP2 shards them; leave update.average out, or "
                    "take plain data parallelism"
                )
            student.skeleton = skeleton(student.module)
        student.module, self.optimizer = accelerator.prepare(student.module, optimizer)
        self.schedule_free = settings.optimizer == "schedule_free"
        if self.schedule_free:
            self.optimizer.train()
        if accelerator.is_fsdp2:
            settle_root(student.module)
        self.mean = {} if settings.average is None else {name: p.detach().clone() for name, p in self._trained()}
        self.taken = 0

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        module = extract_model_from_parallel(self.student.module)
        return [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def accumulate(self, losses: Sequence[Loss], last: bool) -> None:
        # Data parallelism averages over processes while the denominator is already global.
        total = torch.stack([loss.total for loss in losses]).sum() * self.accelerator.num_processes
        self.accelerator.backward(total)

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def apply(self, settings: Update, finite: bool = True) -> dict[str, float]:
        assert isinstance(settings, PlainUpdate)
        trained = [p for p in self.student.module.parameters() if p.requires_grad]
        limit = settings.clip_norm if settings.clip_norm is not None else float("inf")
        norm = float(full(self.accelerator.clip_grad_norm_(trained, limit)))
        signals = {"gradient_norm": norm, "learning_rate": float(settings.learning_rate)}
        if finite and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate
            self.optimizer.step()
            self._look()
        else:
            signals["skipped"] = 1.0
        self.optimizer.zero_grad()
        return signals

    @torch.no_grad()
    def _look(self) -> None:
        """Take the weights into their mean, where it is time to."""
        average = self.settings.average
        self.taken += 1
        if average is not None and self.taken % average.every == 0:
            for name, weight in self._trained():
                self.mean[name].lerp_(weight, 1 - average.decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self.schedule_free:
            with self._at_its_mean():
                yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextmanager
    def _at_its_mean(self) -> Iterator[None]:
        # Kept aside, because going there and back by arithmetic would not lead to the same numbers.
        training = {name: p.detach().clone() for name, p in self._trained()}
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                for name, p in self._trained():
                    p.copy_(training[name])

    def settle(self) -> None:
        if self.schedule_free:
            self.optimizer.eval()
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # Before the first look the mean is where training began.
        average = self.settings.average
        for name, weight in self._trained() if average is not None and self.taken >= average.every else ():
            live = weight.clone()
            weight.copy_(self.mean[name])
            self.mean[name].copy_(live)

    def _names(self) -> list[str]:
        """Names of the parameters, in the order in which the optimiser numbers them."""
        names = {id(p): name for name, p in self._trained()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """What the optimiser keeps of each parameter, by the parameter's name, and the mean of the weights where there
        is one; rates and the like are the recipe's."""
        averages = {"average": self.mean, "taken": self.taken} if self.mean else {}
        if self.schedule_free:
            counts = [{name: group[name] for name in COUNTED} for group in self.optimizer.param_groups]
            with self._at_its_mean():
                averages = {"average": {name: p.detach().clone() for name, p in self._trained()}, "counts": counts}
        names, kept = self._names(), self.optimizer.state_dict()["state"]
        shapes = {name: list(p.shape) for name, p in self._trained()}
        return {
            "optimizer": self.settings.optimizer,
            "shapes": shapes,
            "moments": {names[i]: of for i, of in kept.items()},
            **averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_fits(state)
        if self.mean:
            copy_into(self.mean, state["average"], "average")
            self.taken = state["taken"]
        for group, counts in zip(self.optimizer.param_groups, state.get("counts", ()), strict=False):
            group.update(counts)
        own = self.optimizer.state_dict()["param_groups"]
        trained, numbers = dict(self._trained()), {name: i for i, name in enumerate(self._names())}
        moments = {
            numbers[name]: {
                key: like(v, trained[name]) if isinstance(v, torch.Tensor) and v.ndim else v for key, v in of.items()
            }
            for name, of in state["moments"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": own})

    def _check_fits(self, state: dict[str, Any]) -> None:
        """Raise `RunError` for what another optimiser kept, or this one of other parameters."""
        kind = self.settings.optimizer
        if state["optimizer"] != kind:
            raise RunError(
                f"update.optimizer is {kind!r}, and the checkpoint holds what {state['optimizer']!r} kept, which no "
                f"other can go on with; set update.optimizer={state['optimizer']}, or start another run from the saved "
                "student"
            )
        if self.mean and "average" not in state:
            raise RunError(
                "update.average is set, and the checkpoint holds no mean of the weights; remove update.average, or "
                "start another run from the saved student"
            )
        here = {name: list(p.shape) for name, p in self._trained()}
        for name in dict.fromkeys([*here, *state["shapes"]]):
            shape, stored = (side.get(name, "absent") for side in (here, state["shapes"]))
            if shape != stored:
                raise RunError(
                    f"the checkpoint does not fit the update: the trained {name} is {stored} there and {shape} here"
                )
