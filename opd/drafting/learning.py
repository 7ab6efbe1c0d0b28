"""A drafter that learns beside the model that it helps, from the blocks that were verified while that one wrote."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, field_validator

from opd.choice import OneOf, Settings, as_list, kind_of
from opd.distributions import Categorical, Vocabulary
from opd.divergences.of_blocks import Accepted, Rejected
from opd.drafting.base import Drafter
from opd.drafting.record import blocks_of
from opd.drafting.target import Target, draft_head
from opd.errors import RunError
from opd.objectives import Objective
from opd.objectives.of_slots import OfSlots
from opd.schedules import OverSteps
from opd.trajectories import Trajectories
from opd.weights import copy_into


class Learning(Settings):
    """How a drafter is trained beside the student: one step of AdamW a step of the run, on all blocks that the student
    verified while it wrote the step's rollouts, before the student itself moves."""

    objective: Annotated[list[Annotated[Objective, OneOf(Objective)]], BeforeValidator(as_list)] = Field(
        default=[Accepted(weight=0.5), Rejected(weight=0.5)],
        min_length=1,
        description="What the drafter descends, of drafted blocks: accepted, rejected, pooled, cross_entropy; several "
        "are summed. The default is Draft-OPD",
    )
    learning_rate: Annotated[float, OverSteps(ge=0)] = Field(3e-4, description="The drafter's")
    clip_norm: float | None = Field(1.0, gt=0, description="Largest norm of its gradient; null never clips")
    micro: int = Field(4, ge=1, description="Answers whose blocks are drafted again at once")

    @field_validator("objective")
    @classmethod
    def _of_blocks(cls, value: list[Objective]) -> list[Objective]:
        for objective in value:
            if not isinstance(objective, OfSlots):
                raise ValueError(
                    f"objective {kind_of(objective)!r} says nothing of the slots of drafted blocks; a drafter learns "
                    "by accepted, rejected, pooled or cross_entropy"
                )
            for name in ("teacher", "written_by"):
                if getattr(objective, name) is not None:
                    raise ValueError(
                        f"objective {kind_of(objective)!r} has {name}; what the drafter proposed is all there is, and "
                        f"the student teaches it: remove {name}"
                    )
        return value


class Learner:
    """Trains a drafter. All processes hold the same one, and take the same steps."""

    def __init__(self, settings: Learning, drafter: Drafter):
        self.drafter = drafter
        self.optimizer = torch.optim.AdamW(
            drafter.parameters(), lr=float(settings.learning_rate), weight_decay=0.0, fused=True
        )

    def learn(
        self,
        settings: Learning,
        target: Target,
        vocabulary: Vocabulary,
        made: Trajectories,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, float]:
        """Take one step; all processes call, also without a trajectory of their own. Gradients are those of the
        drafter alone.

        Args:
            target: who verified, with the weights that it verified with.
            vocabulary: the ids that the drafter may propose.
            made: blocks with their `answers`, as `opd.drafting.packing.packed` gives them.

        Returns:
            `drafter_loss` and `drafter_gradient_norm`; nothing where no process has a slot to learn from. Where they
            are no numbers the drafter stays as it is.
        """
        device = made.actions.device
        counts = [each.position_weights(made, "token_mean", sum_over_processes) for each in settings.objective]
        learnt = torch.stack([count.abs().sum() for count in counts]).sum()
        if not float(sum_over_processes(learnt)):
            return {}
        total = torch.zeros((), device=device)
        with torch.enable_grad():
            for micro, here in made.split(settings.micro):
                blocks = blocks_of(micro.contexts, micro.completions(), device)
                head = draft_head(self.drafter, target, vocabulary, 1.0)
                drafted = Categorical(self.drafter(blocks, target.embed), head)
                answers = [answer.select(here) for answer in made.answers or ()]
                losses = [
                    objective(drafted, answers, count[here], micro)
                    for objective, count in zip(settings.objective, counts, strict=True)
                ]
                loss = torch.stack([each.total for each in losses]).sum()
                loss.backward()
                total += loss.detach()
        weights = list(self.drafter.parameters())
        own = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        flat = sum_over_processes(torch.cat([total[None], *(gradient.flatten() for gradient in own)])).to(device)
        norm = float(flat[1:].norm())
        found = {"drafter_loss": float(flat[0]), "drafter_gradient_norm": norm}
        if math.isfinite(norm) and math.isfinite(found["drafter_loss"]):
            scale = 1.0 if settings.clip_norm is None else min(1.0, settings.clip_norm / (norm + 1e-6))
            parts = flat[1:].split([w.numel() for w in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.grad = (scale * part).view_as(weight)
            for group in self.optimizer.param_groups:
                group["lr"] = float(settings.learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The drafter, and what the optimiser keeps of each of its parameters, by name."""
        kept = self.optimizer.state_dict()["state"]
        names = [name for name, _ in self.drafter.named_parameters()]
        return {"drafter": self.drafter.state_dict(), "moments": {names[i]: of for i, of in kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            RunError: it is that of another drafter.
        """
        copy_into(self.drafter.state_dict(), state["drafter"], "drafter of rollout.engine")
        numbers = {name: i for i, (name, _) in enumerate(self.drafter.named_parameters())}
        strange = next((name for name in state["moments"] if name not in numbers), None)
        if strange is not None:
            raise RunError(f"the checkpoint does not fit the drafter of rollout.engine: it has no {strange}")
        moments = {
            numbers[name]: {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in of.items()}
            for name, of in state["moments"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
