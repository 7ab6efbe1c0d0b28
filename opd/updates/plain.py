"""AdamW with gradient clipping and a schedule, through `accelerate`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.optim.lr_scheduler import LambdaLR

from opd.divergences import Loss
from opd.policies.base import Student
from opd.updates.base import Optimiser, Update

Beta = Annotated[float, Field(ge=0, lt=1)]


class PlainUpdate(Update):
    """One optimiser step per batch."""

    kind: Literal["plain"] = "plain"
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: float | None = Field(1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)

    def rate_factor(self, step: int, steps: int) -> float:
        """Share of the learning rate at a step counted from 0. The first step of a warm-up moves the student already."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
            self.schedule
        ]

    def build(self, student: Student, accelerator: Any, steps: int) -> AdamW:
        return AdamW(self, student, accelerator, steps)


class AdamW(Optimiser):
    """The built update."""

    def __init__(self, settings: PlainUpdate, student: Student, accelerator: Any, steps: int):
        self.settings, self.accelerator, self.student = settings, accelerator, student
        trained = [p for p in student.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # accelerate would advance a prepared scheduler once per process; the step is global here.
        self.scheduler = LambdaLR(optimizer, lambda step: settings.rate_factor(step, steps))
        student.module, self.optimizer = accelerator.prepare(student.module, optimizer)

    def accumulate(self, loss: Loss, last: bool) -> None:
        # DDP averages over processes while the denominator is already global.
        total = loss.total * self.accelerator.num_processes
        if last:
            self.accelerator.backward(total)
        else:
            with self.accelerator.no_sync(self.student.module):
                self.accelerator.backward(total)

    def apply(self) -> dict[str, float]:
        trained = [p for p in self.student.module.parameters() if p.requires_grad]
        limit = self.settings.clip_norm if self.settings.clip_norm is not None else float("inf")
        norm = self.accelerator.clip_grad_norm_(trained, limit)
        signals = {"gradient_norm": float(norm), "learning_rate": self.scheduler.get_last_lr()[0]}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return signals

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
