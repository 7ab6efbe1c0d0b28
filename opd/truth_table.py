"""What each objective descends: its expected gradient, by exact enumeration, against the divergence that it promises.

A choice names the kind of scene that it is measured in (`opd.scenes`): a student and a teacher for which an expectation
over what the student draws is a finite sum. The objective is measured through the operator that training uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from opd.choice import choices_of
from opd.divergences import Divergence, ForwardKL, ReverseKL, ReverseKLSampled
from opd.divergences.jensen_shannon import JensenShannon
from opd.objectives.base import label
from opd.scenes import Scene, TokenisedScene

SCENES = 5
TABLE = Path(__file__).with_name("truth_table.json")

Gradients = Callable[[Any], torch.Tensor]
"""An objective seen from outside: of a scene, float64 `[Y, ...]`, the gradient that each draw gives."""


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
        variance: of the gradient that one draw gives, over the squared norm of the promised one.
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


def selectable() -> list[Divergence]:
    """Every choice of the axis, under each of the settings that it asks to be measured with; those that are measured
    in one kind of scene stand together."""
    found: list[Divergence] = []
    for cls in choices_of(Divergence).values():
        assert issubclass(cls, Divergence)
        found += [cls(**settings) for settings in cls.variants]
    order = list(dict.fromkeys(divergence.scene for divergence in found))
    return sorted(found, key=lambda divergence: order.index(divergence.scene))


def measure(
    name: str,
    gradients: Gradients,
    promise: Divergence,
    unbiased: bool,
    scenes: Sequence[Scene] | None = None,
) -> Row:
    """Measure one objective against the divergence that `promise` stands for, by default in scenes of its kind."""
    found: list[dict[str, float]] = []
    for scene in scenes or [promise.scene.random(seed) for seed in range(SCENES)]:
        found.append(_compare(gradients(scene), scene.law(), scene.promised(promise), *scene.kls()))
    middle = {key: float(torch.tensor([f[key] for f in found]).median()) for key in found[0]}
    middle["cosine"] = min(f["cosine"] for f in found)
    return Row(name, promise.descends, unbiased, **middle)


def measure_choice(divergence: Divergence, scenes: Sequence[Scene] | None = None) -> Row:
    """Measure a choice against its own promise."""
    return measure(
        label(divergence), lambda scene: scene.gradients(divergence), divergence, divergence.unbiased, scenes
    )


def under_another_tokenizer() -> list[tuple[Divergence, bool]]:
    """The objectives that are measured against a teacher of another tokenizer too, and whether they promise no bias
    there. Those that go by spans do not: where a span ends hangs on the text behind it, so a log-ratio knows a little
    of tokens that come after it, and crediting a token with what follows it alone leaves that out."""
    return [
        (ReverseKL(), True),
        (ForwardKL(), True),
        (JensenShannon(), True),
        (ReverseKLSampled(discount=1.0), False),
        (ReverseKLSampled(), False),
    ]


def measure_under_another_tokenizer(divergence: Divergence, unbiased: bool, seeds: Sequence[int]) -> Row:
    """Measure a choice in scenes of two tokenizers; one that goes by spans against the whole sequence's divergence."""
    promise = ReverseKLSampled(discount=1.0) if isinstance(divergence, ReverseKLSampled) else divergence
    scenes = [TokenisedScene.random(seed) for seed in seeds]
    name = f"{label(divergence)}, another tokenizer"
    return measure(name, lambda scene: scene.gradients(divergence), promise, unbiased, scenes)


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


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.norm() < 1e-9:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def measure_all() -> list[Row]:
    """The table of everything that can be selected."""
    rows = [measure_choice(divergence) for divergence in selectable()]
    others = under_another_tokenizer()
    return rows + [measure_under_another_tokenizer(choice, exact, range(SCENES)) for choice, exact in others]


def save_table(rows: Sequence[Row], path: Path = TABLE) -> None:
    rounded = [{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
    path.write_text(json.dumps({"command": "python -m benchmarks.objectives", "rows": rounded}, indent=1) + "\n")


def load_table(path: Path = TABLE) -> list[Row]:
    """The table that comes with the package."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in data["rows"]]
