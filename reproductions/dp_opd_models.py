"""The models of the reproduction of DP-OPD, its recipes, and how a student is tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.language.creation import create_model
from opd.reproductions import Stage, train
from opd.reproductions.definition import COSTS, Figures, merged
from reproductions.dp_opd_reviews import CLASSES, PHRASES, QUARTER, ReviewPrompts, score, tokenizer
from reproductions.running_sum import figures_of

SHIFT = 0.6
"""How far private reviews are from public ones."""
STAND_IN = 0.3
"""The same of the public stand-in on which learning rates are chosen: other statistics, by the same rule."""
RECORDS, EXPECTED, STEPS = 20_000, 256, 60
EPSILON, CLIP = 2.0, 1.0
LENGTH = CLASSES * (PHRASES - QUARTER) + 1
PUBLIC, PRIVATE, TEST, RATES = 1, 2, 3, 4
"""Seeds of the sets of rows."""
SEED_OF_RATES = 100


def rows(size: int, shift: float, seed: int) -> dict[str, Any]:
    return {"kind": "dp_opd_reviews", "size": size, "shift": shift, "seed": seed}


def recipe(student: str, steps: int, **changes: Any) -> dict[str, Any]:
    """A recipe on reviews; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"model": student, "template": "plain"},
        "teacher": [],
        "prompts": rows(RECORDS, 0.0, PUBLIC),
        "rollout": {"kind": "data", "max_new_tokens": LENGTH},
        "objective": ["sft"],
        "reduction": "sequence_mean",
        "update": {"learning_rate": 1e-3},
        "batch": {"prompts": 64, "micro": 64},
        # Students are measured by their perplexity on references, outside of the run.
        "evaluation": {"prompts": [rows(2, 0.0, TEST)], "max_new_tokens": 4, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return replaced(base, changes)


def private(student: str, shift: float, epsilon: float | None, seed: int, **changes: Any) -> dict[str, Any]:
    """A recipe on records; without epsilon gradients are clipped and not hidden."""
    noise = {"noise_multiplier": 0.0} if epsilon is None else {"epsilon": epsilon}
    own = {
        "prompts": rows(RECORDS, shift, seed),
        "curriculum": {"kind": "poisson"},
        "update": {"kind": "differentially_private", "clip_norm": CLIP, "learning_rate": 1e-3, **noise},
        "batch": {"prompts": EXPECTED, "micro": 64},
    }
    made = merged(recipe(student, STEPS), own)
    return replaced(made, changes)


def replaced(block: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`block` with `changes`, of which teacher, rollout and objective are put in the place of the others."""
    whole = {name: changes[name] for name in ("teacher", "rollout", "objective") if name in changes}
    return {**merged(block, changes), **whole}


def new_model(folder: Path, inputs: Mapping[str, Path], *, width: int, layers: int, seed: int) -> Figures:
    """A model with random weights and the grammar's tokenizer, in `folder/run/student`."""
    create_model(folder / "run" / "student", tokenizer(), width=width, layers=layers, heads=4, seed=seed)
    return {}


def references(size: int, shift: float, words: Any) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Of test reviews the prompts, and the ids of prompts `[size, P]` and of their continuations `[size, T]`."""
    found = [f for _, f in ReviewPrompts(size=size, shift=shift, seed=TEST).rows() if isinstance(f, dict)]
    texts = [str(f["prompt"]) for f in found]
    begun = torch.tensor([words(text)["input_ids"] for text in texts])
    return texts, begun, torch.tensor([words(f["response"])["input_ids"] for f in found])


@torch.no_grad()
def losses(model: Path, *, size: int, shift: float) -> torch.Tensor:
    """float32 `[size]`: nats a word of the reference continuations of test reviews under a model."""
    language, words = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    _, begun, rest = references(size, shift, words)
    log_q = language(torch.cat([begun, rest], 1)).logits[:, begun.shape[1] - 1 : -1].float().log_softmax(-1)
    found: torch.Tensor = -log_q.gather(2, rest[..., None]).squeeze(2).mean(1)
    return found


@torch.no_grad()
def measured(model: Path, *, size: int, shift: float, seed: int) -> Figures:
    """What a student is on test reviews.

    Returns:
        `nll`, the mean of `losses`, and by `items` each review's; `rollout_nll`, nats a word under the true grammar of
        what it writes itself behind the same prompts, and `valid`, the share of words of the right class, both also for
        the last third as `..._late`.
    """
    language, words = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    texts, begun, rest = references(size, shift, words)
    generator = torch.Generator().manual_seed(seed)
    made = language(begun, use_cache=True)
    written = []
    for _ in range(rest.shape[1]):
        following = made.logits[:, -1].float().softmax(-1)
        written.append(torch.multinomial(following, 1, generator=generator))
        made = language(written[-1], past_key_values=made.past_key_values, use_cache=True)
    completions = [words.decode(row.tolist()) for row in torch.cat(written, 1)]
    scores = [score(text, completion, shift) for text, completion in zip(texts, completions, strict=True)]
    third = rest.shape[1] * 2 // 3
    of_each = losses(model, size=size, shift=shift)
    return {
        "nll": float(of_each.mean()),
        "rollout_nll": _mean([loss for each, _ in scores for loss in each]),
        "rollout_nll_late": _mean([loss for each, _ in scores for loss in each[third:]]),
        "valid": _mean([float(fits) for _, each in scores for fits in each]),
        "valid_late": _mean([float(fits) for _, each in scores for fits in each[third:]]),
        "items": {"nll": {str(i): float(loss) for i, loss in enumerate(of_each)}},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_rate(block: Mapping[str, Any], rate: float) -> dict[str, Any]:
    return merged(block, {"update": {"learning_rate": rate}})


def seeded(block: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A private recipe whose draws and noise a job can make again; nobody's privacy hangs on made-up reviews."""
    if block["update"].get("kind") != "differentially_private":
        return dict(block)
    return merged(block, {"curriculum": {"seed": seed}, "update": {"seed": seed}})


def trained(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], seed: int) -> Figures:
    """As `train`, with draws and noise of the seed."""
    return train(folder, inputs, recipe=seeded(recipe, seed), seed=seed)


def best_rate(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    rates: Sequence[float],
    size: int,
    shift: float,
    seed: int,
) -> Figures:
    """Every rate once on the public stand-in, with a seed that no arm has; the best by the loss on its test reviews."""
    found = {}
    for rate in rates:
        place = folder / f"{rate:g}"
        place.mkdir()
        trained(place, inputs, recipe=with_rate(recipe, rate), seed=seed)
        found[rate] = float(losses(place / "run" / "student", size=size, shift=shift).mean())
    return {"rate": min(found, key=found.__getitem__), **{f"nll at {rate:g}": value for rate, value in found.items()}}


def arm(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    rate_from: str,
    size: int,
    shift: float,
    seed: int,
) -> Figures:
    """Train a student of one seed at the rate that a stage chose, and test it."""
    models = {name: place for name, place in inputs.items() if name != rate_from}
    rate = figures_of(inputs[rate_from])["rate"]
    figures = trained(folder, models, recipe=with_rate(recipe, rate), seed=seed)
    return {**figures, **measured(folder / "run" / "student", size=size, shift=shift, seed=seed), "rate": rate}


def figured(folder: Path, inputs: Mapping[str, Path], *, of: str, seed: int) -> Figures:
    """What the job of an arm's student measured."""
    return figures_of(inputs[of])


def untrained(folder: Path, inputs: Mapping[str, Path], *, of: str, size: int, shift: float, seed: int) -> Figures:
    """A model as it is, which costs nothing more."""
    found = measured(inputs[of] / "run" / "student", size=size, shift=shift, seed=seed)
    return {**dict.fromkeys(COSTS, 0.0), **found}


STUDENT, TEACHER = {"width": 64, "layers": 2}, {"width": 128, "layers": 3}
STAGES: dict[str, Stage] = {
    "blank teacher": Stage(new_model, {**TEACHER, "seed": 0}),
    "teacher": Stage(
        trained,
        {"recipe": recipe("{blank teacher}/run/student", 500, update={"learning_rate": 2e-3}), "seed": 0},
        ["blank teacher"],
    ),
    "blank": Stage(new_model, STUDENT, per_seed=True),
    "start": Stage(
        trained,
        {"recipe": recipe("{blank}/run/student", 150, update={"learning_rate": 3e-3}, prompts=rows(2000, 0.0, PUBLIC))},
        ["blank"],
        per_seed=True,
    ),
    "blank of rates": Stage(new_model, {**STUDENT, "seed": SEED_OF_RATES}),
    "start of rates": Stage(
        trained,
        {
            "recipe": recipe(
                "{blank of rates}/run/student", 150, update={"learning_rate": 3e-3}, prompts=rows(2000, 0.0, PUBLIC)
            ),
            "seed": SEED_OF_RATES,
        },
        ["blank of rates"],
    ),
}
"""The public teacher, once, and of each seed a student that learnt from a few public reviews."""
