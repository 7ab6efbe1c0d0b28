"""What each objective descends: its expected gradient, by exact enumeration, against the divergence that it promises.

A scene is a student and a teacher over all sequences of `LENGTH` tokens from `VOCABULARY` ids, both tabular: one row of
logits for every prefix. The student's sequences are enumerated with their exact probabilities, so an expectation over
rollouts is a finite sum. The objective is measured through the operator that training uses.

For Gaussians a scene is a student's and a teacher's velocity at a few states of a sampler, and the expectation over the
latents drawn is a quadrature that is exact for the polynomials that the gradients are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.polynomial.hermite_e import hermegauss

from opd.choice import choices_of
from opd.distributions import Categorical, Head
from opd.divergences import CategoricalDivergence, Divergence, Target, divergence_loss
from opd.divergences.gaussian_kl import GaussianKL
from opd.flow.transition import transition
from opd.objectives.base import label
from opd.prompts import Prompt
from opd.trajectories import Trajectories

VOCABULARY, LENGTH, SCENES = 10, 2, 5
TABLE = Path(__file__).with_name("truth_table.json")

Gradients = Callable[["Scene"], torch.Tensor]
"""An objective seen from outside: float64 `[Y, P, V]`, the gradient in the logits that each sequence gives."""


@dataclass(frozen=True)
class Scene:
    """Y = V ** L sequences and P prefixes.

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
    def random(cls, seed: int) -> Scene:
        """Opinions of moderate strength that partly agree."""
        g = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        shape = (len(prefixes), VOCABULARY)
        shared, own, other = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
        sequences = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
        states = [[index[y[:t]] for t in range(LENGTH)] for y in sequences]
        return cls(shared + own, shared + 1.5 * other, torch.tensor(sequences), torch.tensor(states))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """`[Y]` probability of every sequence."""
        log_probs = torch.log_softmax(logits, -1)[self.states, self.actions]
        return log_probs.sum(-1).exp()


@dataclass(frozen=True)
class Row:
    """One line of the table; medians over scenes but for `cosine`, which is the worst.

    Attributes:
        objective: the choice and its settings.
        descends: what it promises.
        unbiased: whether it promises that without bias.
        cosine: between expected gradient and promised gradient.
        norm_ratio: of the expected gradient's norm to the promised one's.
        bias: norm of their difference over the norm of the promised one.
        variance: of the gradient that one sequence gives, over the squared norm of the promised one.
        to_forward_kl, to_reverse_kl: cosine of the expected gradient to each exact KL, for orientation.
    """

    objective: str
    descends: str
    unbiased: bool
    cosine: float
    norm_ratio: float
    bias: float
    variance: float
    to_forward_kl: float
    to_reverse_kl: float


def selectable() -> list[CategoricalDivergence]:
    """Every choice of the axis, under each of the settings that it asks to be measured with."""
    found: list[CategoricalDivergence] = []
    for cls in choices_of(Divergence).values():
        if issubclass(cls, CategoricalDivergence):
            found += [cls(**settings) for settings in cls.variants]
    return found


def gradients_of(divergence: CategoricalDivergence) -> Gradients:
    """What training with `divergence` computes for every sequence, through the loss operator itself."""

    def measure(scene: Scene) -> torch.Tensor:
        states = scene.states.flatten()
        one_hot = torch.eye(len(scene.student))[states]
        table = scene.student.float().T.contiguous().requires_grad_()
        teacher = Categorical(one_hot, Head(scene.teacher.float().T.contiguous()))
        loss = divergence_loss(
            divergence,
            Categorical(one_hot, Head(table)),
            [Target(teacher)],
            torch.ones(len(states)),
            scene.actions.flatten(),
            torch.full((len(scene.actions),), LENGTH),
            per_example=True,
        )
        assert loss.per_example is not None
        rows = [torch.autograd.grad(value, table, retain_graph=True)[0] for value in loss.per_example]
        return torch.stack(rows).transpose(1, 2).double()

    return measure


def promised_gradient(scene: Scene, divergence: CategoricalDivergence) -> torch.Tensor:
    """float64 `[P, V]` gradient of the exact divergence on the student's own states."""
    z = scene.student.clone().requires_grad_()
    log_q, log_p = torch.log_softmax(z, -1), torch.log_softmax(scene.teacher, -1)
    if divergence.sequence_level:
        whole_q = log_q[scene.states, scene.actions].sum(-1)
        whole_p = log_p[scene.states, scene.actions].sum(-1)
        total = divergence.exact(whole_p, whole_q)
    else:
        # States are sampled data: their probabilities carry no gradient.
        visits = torch.zeros(len(z), dtype=torch.float64)
        weights = scene.probabilities(scene.student)[:, None].expand_as(scene.states)
        visits.index_add_(0, scene.states.flatten(), weights.flatten())
        total = (visits * divergence.exact(log_p, log_q)).sum()
    return torch.autograd.grad(total, z)[0]


def measure(
    name: str,
    gradients: Gradients,
    promise: CategoricalDivergence,
    unbiased: bool,
    scenes: Sequence[Scene] | None = None,
) -> Row:
    """Measure one objective against the divergence that `promise` stands for."""
    from opd.divergences import ForwardKL, ReverseKL

    found: list[dict[str, float]] = []
    for scene in scenes or [Scene.random(seed) for seed in range(SCENES)]:
        each = gradients(scene)
        kls = (promised_gradient(scene, kl) for kl in (ForwardKL(), ReverseKL()))
        found.append(_compare(each, scene.probabilities(scene.student), promised_gradient(scene, promise), *kls))
    return _row(name, promise, unbiased, found)


def _compare(
    each: torch.Tensor, q: torch.Tensor, target: torch.Tensor, forward: torch.Tensor, reverse: torch.Tensor
) -> dict[str, float]:
    """Numbers of a `Row` for one scene: gradients `[Y, ...]` with probabilities `[Y]`, and what they should be."""
    shape = (-1, *(1,) * (each.dim() - 1))
    expected = (q.view(shape) * each).sum(0)
    spread = (q.view(shape) * (each - expected) ** 2).sum()
    norm = target.norm()
    # What is left of a zero in float32 has a direction, and no meaning.
    expected = expected * (expected.norm() > 1e-5 * norm)
    return {
        "cosine": _cosine(expected, target),
        "norm_ratio": float(expected.norm() / norm),
        "bias": float((expected - target).norm() / norm),
        "variance": float(spread / norm**2),
        "to_forward_kl": _cosine(expected, forward),
        "to_reverse_kl": _cosine(expected, reverse),
    }


def _row(name: str, promise: Divergence, unbiased: bool, found: Sequence[dict[str, float]]) -> Row:
    middle = {key: float(torch.tensor([f[key] for f in found]).median()) for key in found[0]}
    middle["cosine"] = min(f["cosine"] for f in found)
    return Row(name, promise.descends, unbiased, **middle)


QUADRATURE, NUMBERS = 4, 2
"""Nodes along each number of a latent, and numbers of a latent."""


def measure_gaussian(name: str, divergence: GaussianKL) -> Row:
    """Measure an estimator of the Gaussian divergence against the gradient of the divergence itself."""
    t, following = torch.tensor([1.0, 0.9, 0.6, 0.3]), torch.tensor([0.9, 0.6, 0.3, 0.1])
    nodes, weights = hermegauss(QUADRATURE)
    grid = torch.tensor(list(itertools.product(nodes, repeat=NUMBERS)), dtype=torch.float32)
    q = torch.tensor([math.prod(each) for each in itertools.product(weights, repeat=NUMBERS)], dtype=torch.float64)
    q = q / q.sum()
    found = []
    for seed in range(SCENES):
        g = torch.Generator().manual_seed(seed)
        x, own, other = (torch.randn(len(t), NUMBERS, generator=g) for _ in range(3))
        noise = torch.full_like(t, 0.7)
        teacher = transition(x, other, t, following, noise)
        each = []
        for node in grid:
            velocity = own.clone().requires_grad_()
            student = transition(x, velocity, t, following, noise)
            actions = student.mean.detach() + student.std[:, None] * node
            drawn = _drawn(actions, student.log_prob(actions).detach())
            divergence(student, [Target(teacher)], torch.ones(len(t)), drawn).total.backward()
            assert velocity.grad is not None
            each.append(velocity.grad.double())
        velocity = own.double().requires_grad_()
        student = transition(x, own, t, following, noise)
        factor = (0.5 * (student.gain / student.std).square()).double()
        exact = (factor * (velocity - other.double()).square().mean(1)).sum()
        target = torch.autograd.grad(exact, velocity)[0]
        # With one standard deviation for both, the two KLs are one.
        found.append(_compare(torch.stack(each), q, target, target, target))
    return _row(name, divergence, divergence.unbiased, found)


def _drawn(actions: torch.Tensor, log_probs: torch.Tensor) -> Trajectories:
    """One trajectory of these actions."""
    count = len(actions)
    return Trajectories(
        prompts=[Prompt("scene", {})],
        contexts=[None],
        actions=actions,
        lengths=torch.tensor([count]),
        behaviour_log_probs=log_probs,
        finished=torch.ones(1, dtype=torch.bool),
        learn=torch.ones(count, dtype=torch.bool),
        authors=torch.zeros(count, dtype=torch.uint8),
        groups=torch.zeros(1, dtype=torch.int64),
    )


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.norm() < 1e-9:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def measure_all() -> list[Row]:
    """The table of everything that can be selected."""
    gaussian = [GaussianKL(**settings) for settings in GaussianKL.variants]
    return [
        *(measure(label(d), gradients_of(d), d, d.unbiased) for d in selectable()),
        *(measure_gaussian(label(d), d) for d in gaussian),
    ]


def save_table(rows: Sequence[Row], path: Path = TABLE) -> None:
    rounded = [{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
    path.write_text(json.dumps({"command": "python -m benchmarks.objectives", "rows": rounded}, indent=1) + "\n")


def load_table(path: Path = TABLE) -> list[Row]:
    """The table that comes with the package."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in data["rows"]]
