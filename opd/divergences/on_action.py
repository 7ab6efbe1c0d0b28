"""Base of estimators that see only the action taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from opd.distributions import Distribution, Spans, Target, spans_in
from opd.divergences.base import LEFT_BY_SUMS, CategoricalDivergence
from opd.errors import IncompatibleError
from opd.objectives.base import Writing, check_draws
from opd.operator import Chunk, Compared, Whole, along_actions


class OnAction(CategoricalDivergence):
    """Estimators that see only the action taken: policy gradients whose reward is a log-ratio.

    With a teacher of another tokenizer an action is a span: its log-probabilities are those of its tokens by the chain
    rule, on both sides, and each of its positions has the gradient of its own token with the span's coefficient. A
    span's value is shared out evenly over its positions.
    """

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "sampled", "aligned", "spans")
    takes_offsets: ClassVar[bool] = True
    alternative: ClassVar[str] = "ask the teacher for the log-probability of given tokens"

    @property
    def sees_whole_trajectories(self) -> bool:
        """Whether a position is credited with what follows it, so that `lengths` are needed and not just one chunk."""
        return False

    def counted(self, spans: Spans) -> torch.Tensor:
        """bool `[N]`: of an answer in spans, the positions that count."""
        return spans.compared

    def concerned(self, answer: Distribution) -> torch.Tensor | None:
        spans = spans_in(answer)
        return None if spans is None else self.counted(spans)

    @abstractmethod
    def value_and_coefficient(
        self, log_p: torch.Tensor, log_q: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimate and the factor on `grad log q(action)`.

        Args:
            log_p: float32 `[N]`, the teacher's log-probability of each action taken, with a shaping's offset; detached.
            log_q: float32 `[N]`, the student's; detached.
            lengths: int64 `[B]`, positions of each trajectory, summing to N.

        Returns:
            `[N]` values in nats and `[N]` coefficients: the position's gradient is `coefficient * grad log q(action)`.
        """

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        # A span may lie in several chunks.
        if not self.sees_whole_trajectories and all(spans_in(t.distribution) is None for t in whole.targets):
            return self._compare
        found = self._sum_targets(whole, whole.lengths)
        return lambda chunk: along_actions(chunk, *(each[chunk.index] for each in found))

    def _compare(self, chunk: Chunk) -> Compared:
        return along_actions(chunk, *self._sum_targets(chunk, torch.ones(len(chunk.index)).long()))

    def _sum_targets(
        self, here: Chunk | Whole, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values and coefficients of the estimate for each teacher, summed with the teachers' weights, and gaps: half
        the square of a log-ratio is its size as a KL."""
        taken = here.taken()
        value, coefficient, gap = torch.zeros(3, len(taken), device=taken.device)
        for target in here.targets:
            spans = spans_in(target.distribution)
            if spans is not None:
                v, c, ratio = self._over_spans(spans, target, taken, lengths)
            else:
                log_p = here.answered(target)
                v, c = self.value_and_coefficient(log_p, taken, lengths)
                ratio = log_p - taken
            value += v * target.weight
            coefficient += c * target.weight
            counts = torch.as_tensor(target.weight, device=taken.device) != 0
            ratio = (ratio.abs() - LEFT_BY_SUMS).clamp_(min=0)
            gap = torch.maximum(gap, 0.5 * ratio.square() * counts)
        return value, coefficient, gap

    def _over_spans(
        self, spans: Spans, target: Target, taken: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[N]` values, coefficients and log-ratios where an action is a span; 0 outside of those that count."""
        moved = spans.log_probs if target.offset is None else spans.log_probs + target.offset.to(taken)
        log_p, log_q, sizes = (spans.sums(each) for each in (moved.float(), taken, torch.ones_like(taken)))
        ends = lengths.cumsum(0).to(taken.device)
        opened = torch.cat([ends.new_zeros(1), spans.begins.long().cumsum(0)])
        per_trajectory = (opened[ends] - opened[ends - lengths.to(ends.device)]).to(lengths.device)
        value, coefficient = self.value_and_coefficient(log_p, log_q, per_trajectory)
        here = self.counted(spans)
        owners = spans.owners()[here]
        found = torch.zeros(3, len(taken), device=taken.device)
        found[:, here] = torch.stack([value / sizes, coefficient, (log_p - log_q) / sizes])[:, owners]
        return found[0], found[1], found[2]

    def check_trajectories(self, rollout: Writing) -> None:
        check_draws(self, rollout)
        if rollout.stale:
            raise IncompatibleError(
                f"objective {self.model_dump()['kind']!r} needs samples of the student as it is, and "
                "rollout.engine.overlap draws them from weights one step old: add shaping truncated_importance, take "
                "reverse_kl, which compares whole distributions, or leave overlap out"
            )
        if rollout.learners != {"student"} or not rollout.current:
            kind = self.model_dump()["kind"]
            raise IncompatibleError(
                f"objective {kind!r} needs the student's own samples: on others its expectation is not what it says. "
                "Take rollout: student, or reverse_kl, which compares whole distributions, or on stored ones lightning"
            )
