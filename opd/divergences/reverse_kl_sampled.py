"""Reverse KL from the sampled token alone, as a policy gradient."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from opd.distributions import Distribution, Spans
from opd.divergences.on_action import OnAction
from opd.errors import IncompatibleError
from opd.schedules import OverSteps


class ReverseKLSampled(OnAction):
    """`-sg(A_t) * log q(a_t)` with `A_t = log p(a_t) - log q(a_t)`, detached.

    On actions drawn from the student its expectation is the gradient of reverse KL at each state. With `discount`
    g > 0 a position is also credited with what follows, `A_t = sum_s g^(s-t) r_s`, and then the expectation is that of
    the sequence-level objective. `clamp` bounds |r_t|, which biases the gradient where it fires.
    """

    kind: Literal["reverse_kl_sampled"] = "reverse_kl_sampled"
    alone: ClassVar[bool] = True
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"clamp": 1.0}, {"discount": 0.5}, {"discount": 1.0})
    discount: float = Field(
        0.0, ge=0.0, le=1.0, description="Of the log-ratios of later tokens; 0 counts each token's own alone"
    )
    clamp: Annotated[float, OverSteps(gt=0)] | None = Field(
        None, description="Largest log-ratio of a token, or of a span, either way; default no bound"
    )
    spans: Literal["all", "several"] = Field(
        "all",
        description="Under a teacher of another tokenizer: every span, or those alone that are several tokens on a "
        "side, beside an objective that compares whole distributions at the others",
    )

    @field_validator("spans")
    @classmethod
    def _without_what_follows(cls, value: str, info: ValidationInfo) -> str:
        if value == "several" and info.data.get("discount"):
            raise ValueError("a discount credits a span with all that follow; set discount: 0, or spans: all")
        return value

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        super().check_accepts(target, source)
        if self.spans == "several" and target.kind not in ("aligned", "spans"):
            raise IncompatibleError(
                f"objective 'reverse_kl_sampled' with spans: several counts what is several tokens on a side, and "
                f"{source} has the student's tokenizer: remove the key, or the objective"
            )

    def counted(self, spans: Spans) -> torch.Tensor:
        return spans.compared if self.spans == "all" else spans.compared & ~spans.single

    @property
    def sees_whole_trajectories(self) -> bool:
        return self.discount > 0

    @property
    def descends(self) -> str:
        return "sequence-level reverse_kl" if self.sequence_level else "reverse_kl"

    @property
    def sequence_level(self) -> bool:
        return self.discount > 0

    @property
    def unbiased(self) -> bool:
        return self.clamp is None and self.discount in (0.0, 1.0)

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def value_and_coefficient(
        self, log_p: torch.Tensor, log_q: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reward = log_p - log_q
        advantage = reward if self.clamp is None else reward.clamp(-self.clamp, self.clamp)
        if self.discount:
            advantage = discounted_return(advantage, lengths, self.discount)
        return -reward, -advantage


def discounted_return(reward: torch.Tensor, lengths: torch.Tensor, discount: float) -> torch.Tensor:
    """`R_t = r_t + discount * R_(t+1)` within each trajectory of a packed `[N]` reward."""
    rows = list(torch.split(reward, lengths.tolist()))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    result = torch.empty_like(padded)
    following = torch.zeros_like(padded[:, 0])
    for t in range(padded.shape[1] - 1, -1, -1):
        following = padded[:, t] + discount * following
        result[:, t] = following
    return torch.cat([result[i, :n] for i, n in enumerate(lengths.tolist())])
