"""Imitation of the teacher's likeliest action at each state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from opd.choice import kind_of
from opd.distributions import Categorical, Distribution, Target, TopK
from opd.errors import IncompatibleError
from opd.objectives.base import Objective
from opd.operator import Chunk, Compared, Loss, Whole, divergence_loss
from opd.trajectories import Trajectories


class HardCE(Objective):
    """`-log q(argmax_a p(a))`: hard labels of the teacher, on whoever's states (DAgger's loss; VLA-OPD's ablation). It
    is no divergence: it does not vanish where student and teacher agree, and drives the entropy to zero. Logged: `nll`.
    """

    kind: Literal["hard_ce"] = "hard_ce"
    modality: ClassVar[str | tuple[str, ...] | None] = ("language", "action")
    called: ClassVar[str] = "nll"
    needs_teacher: ClassVar[bool] = True
    shaped: ClassVar[bool] = True
    buffers: ClassVar[int] = 1

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        assert isinstance(student, Categorical)
        actions, lengths = trajectories.actions, trajectories.lengths
        loss = divergence_loss(self, student, targets, weights, actions, lengths, per_example=per_example)
        return replace(loss, measured={"nll": loss.values})

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        return lambda chunk: chunk.over_targets(lambda answer: _with_one(chunk, answer))

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        if target.kind not in ("categorical", "top_k"):
            raise IncompatibleError(
                f"objective {kind_of(self)!r} needs the teacher's likeliest token, and {source} answers "
                f"{target.kind!r}: ask the teacher for its top log-probabilities, or take reverse_kl_sampled"
            )


def _with_one(chunk: Chunk, answer: Distribution) -> Compared:
    if isinstance(answer, TopK):
        best = answer.ids.gather(1, answer.log_probs.argmax(1, keepdim=True))
        columns = chunk.vocabulary.columns(best)
    else:
        assert isinstance(answer, Categorical)
        columns = chunk.log_p(answer).argmax(1, keepdim=True)
    values = -chunk.log_q.gather(1, columns).squeeze(1)
    # d -log q(y) / d logits = q - onehot(y)
    grad = chunk.log_q.exp_()
    return Compared(values, grad.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=grad.dtype)))
