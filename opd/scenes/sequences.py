"""Scenes of tokens: every sequence of a few tokens from a few ids, enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from opd.distributions import Categorical, Head, Target
from opd.operator import Comparison, divergence_loss
from opd.scenes.base import Scene

VOCABULARY, LENGTH = 10, 2

Exact = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`exact(log_p, log_q)`: a textbook divergence, differentiable in `log_q`."""


class Promise(Protocol):
    """A divergence over ids as far as its promise goes."""

    @property
    def sequence_level(self) -> bool:
        """Whether the promise is about whole sequences instead of each state visited."""

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """The promised divergence of `[..., S]` log-probabilities, `[...]`."""


@dataclass(frozen=True)
class SequenceScene(Scene):
    """Y = V ** L sequences and P prefixes; student and teacher are tables, one row of logits for every prefix.

    Attributes:
        student, teacher: float64 logits `[P, V]`.
        actions: int64 `[Y, L]`, every sequence.
        states: int64 `[Y, L]`, index of the prefix before each action.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    actions: torch.Tensor
    states: torch.Tensor

    @classmethod
    def random(cls, seed: int) -> SequenceScene:
        """Opinions of moderate strength that partly agree."""
        g = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        shape = (len(prefixes), VOCABULARY)
        shared, own, other = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
        sequences = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
        states = [[index[y[:t]] for t in range(LENGTH)] for y in sequences]
        return cls(shared + own, shared + 1.5 * other, torch.tensor(sequences), torch.tensor(states))

    def law(self) -> torch.Tensor:
        log_probs = torch.log_softmax(self.student, -1)[self.states, self.actions]
        return log_probs.sum(-1).exp()

    def gradients(self, divergence: Comparison) -> torch.Tensor:
        """float64 `[Y, P, V]`, through the operator that training uses."""
        states = self.states.flatten()
        one_hot = torch.eye(len(self.student))[states]
        table = self.student.float().T.contiguous().requires_grad_()
        teacher = Categorical(one_hot, Head(self.teacher.float().T.contiguous()))
        loss = divergence_loss(
            divergence,
            Categorical(one_hot, Head(table)),
            [Target(teacher)],
            torch.ones(len(states)),
            self.actions.flatten(),
            torch.full((len(self.actions),), LENGTH),
            per_example=True,
        )
        assert loss.per_example is not None
        rows = [torch.autograd.grad(value, table, retain_graph=True)[0] for value in loss.per_example]
        return torch.stack(rows).transpose(1, 2).double()

    def promised(self, divergence: Promise) -> torch.Tensor:
        """float64 `[P, V]`."""
        if not divergence.sequence_level:
            return self._by_state(divergence.exact)
        z, log_q, log_p = self._log_probs()
        whole_q = log_q[self.states, self.actions].sum(-1)
        whole_p = log_p[self.states, self.actions].sum(-1)
        return torch.autograd.grad(divergence.exact(whole_p, whole_q), z)[0]

    def kls(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self._by_state(lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(-1)),
            self._by_state(lambda log_p, log_q: (log_q.exp() * (log_q - log_p)).sum(-1)),
        )

    def _by_state(self, exact: Exact) -> torch.Tensor:
        z, log_q, log_p = self._log_probs()
        # States are sampled data: their probabilities carry no gradient.
        visits = torch.zeros(len(z), dtype=torch.float64)
        weights = self.law()[:, None].expand_as(self.states)
        visits.index_add_(0, self.states.flatten(), weights.flatten())
        return torch.autograd.grad((visits * exact(log_p, log_q)).sum(), z)[0]

    def _log_probs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The student's logits as a leaf, its log-probabilities and the teacher's."""
        z = self.student.clone().requires_grad_()
        return z, torch.log_softmax(z, -1), torch.log_softmax(self.teacher, -1)
