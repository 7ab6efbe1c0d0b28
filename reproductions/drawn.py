"""What the reproduction on drawings measures of a flow model: tasks, quality, divergence, and judges beside them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import false_discovery_control, fisher_exact

from opd.api import assembled
from opd.distributions import Gaussian
from opd.divergences.gaussian_kl import GaussianKL
from opd.objectives import Objective
from opd.policies.held_out import STREAM
from opd.prompts import Prompt, count_repeats
from opd.prompts.drawings import DrawingPrompts
from opd.recipe import parse_recipe
from opd.reproductions.definition import COSTS, Figures, merged
from opd.reproductions.training import filled
from opd.rollouts import Request
from opd.run import Run
from opd.teachers import answers_of
from opd.verifiers.drawing import DrawingReward
from reproductions.drawing_judges import (
    Classifier,
    background_entropy,
    edge_sharpness,
    frechet_distance,
    nearest_distance,
    train_classifier,
)
from reproductions.running_sum import reached

TASKS = ("count", "glyph", "scene")
PIXELS = 16
SETTINGS: dict[str, dict[str, Any]] = {"count": {"moved": False}, "glyph": {"alphabet": "2347ACEHKLTX", "moved": False}}
"""Of a task. All places, sizes and characters are more than so small a base learns to draw within the time."""


def drawings(task: str, size: int, split: str = "train", seed: int = 0) -> dict[str, Any]:
    """The recipe's block of prompts of one task, of `PIXELS` a side."""
    return {
        "kind": "drawings",
        "task": {"kind": task, "pixels": PIXELS, **SETTINGS.get(task, {})},
        "size": size,
        "split": split,
        "seed": seed,
    }


@dataclass(frozen=True)
class Drawn:
    """Pictures `[B, H, W, 3]` of prompts, in the prompts' order."""

    run: Run
    prompts: list[Prompt]
    pictures: np.ndarray

    def scores(self, reward: str = "task", graded: bool = False) -> np.ndarray:
        """float64 `[B]`."""
        verifier = DrawingReward(reward={reward: 1.0}, graded=graded)
        pairs = zip(self.prompts, self.pictures, strict=True)
        return np.array([verifier.score(prompt, picture) for prompt, picture in pairs], float)


def drawn(recipe: Mapping[str, Any], inputs: Mapping[str, Path], model: str, seed: int) -> Drawn:
    """A picture of every held-out prompt of a recipe, by the ODE of the model that lies in `model`; a prompt's noise
    depends on `seed` and on the prompt alone."""
    run = opened(recipe, inputs, model, seed)
    return drawn_of(run, run.held_out, 1)


def opened(recipe: Mapping[str, Any], inputs: Mapping[str, Path], model: str, seed: int) -> Run:
    """A recipe's run with the model that lies in `model` as its student, to be looked at and not trained."""
    settings = merged(filled(recipe, inputs), {"student": {"model": filled(model, inputs)}, "seed": seed})
    run = assembled(parse_recipe({**settings, "tracking": {"trackers": []}}, "recipe of this test"))
    run.student.module.eval()
    return run


def drawn_of(run: Run, prompts: Sequence[Prompt], each: int) -> Drawn:
    """`each` pictures of every prompt, by the ODE of the run's student."""
    made = run.sampler(run.at(0))(prompts, each, 1, stream=STREAM)
    return Drawn(run, list(made.prompts), np.stack(run.student.outcomes(made)))


def abilities(made: Drawn) -> Figures:
    """`count`, `glyph` and `scene`, the shares of pictures that are right; of count the mean over the shares of each
    number, which `by_number` holds; and `quality`, a mean over all pictures."""
    numbers = by_number(made.prompts, made.scores())
    right: Figures = {"by_number": numbers, "count": sum(numbers.values()) / len(numbers)}
    for task in TASKS[1:]:
        mine = [score for prompt, score in zip(made.prompts, made.scores(), strict=True) if _task(prompt) == task]
        right |= {task: float(np.mean(mine))} if mine else {}
    return right | {"quality": float(made.scores("quality").mean())}


def by_number(prompts: Sequence[Prompt], scores: np.ndarray) -> dict[str, float]:
    """`count_1` and so on, the mean score of the prompts of count that ask for so many."""
    numbers = np.array([prompt.fields["number"] if _task(prompt) == "count" else 0 for prompt in prompts])
    return {f"count_{n}": float(scores[numbers == n].mean()) for n in np.unique(numbers[numbers > 0])}


def _task(prompt: Prompt) -> str:
    return str(prompt.fields["task"])


def measured(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    model: str,
    recipe: Mapping[str, Any],
    trained: str | None = None,
    experts: Sequence[str] = (),
    draws: int = 0,
    way: Sequence[str] = (),
    spent: int = 0,
    seed: int,
) -> Figures:
    """A saved model on the recipe's held-out prompts: equally many of count, glyph, scene and unseen count. The stage
    `judges` made the judges, `experts drawn` what `wins` compares with.

    Args:
        trained: stage that trained the model, for costs and curve.
        experts: stages whose cost stands under `expert_cpu_seconds`.
        draws: pictures a prompt for `wins`; 0 leaves it out.
        way: two stages that trained: nine tenths from where the first began to where the second ended, in accuracy, is
            the goal of `sampled_tokens_to_goal`; empty leaves it out.
        spent: denoising steps that were drawn before this training, added to that figure.

    Returns:
        `count`, `glyph`, `scene`, `unseen`: share of pictures that are right; `quality`, mean over count, glyph and
        scene; `scene_quality` of scene alone; `mean` of count, glyph and quality; `count_1` and so on, count by number;
        `kl`, mean divergence from the routed experts along the model's own SDE, and `kl_experts` along theirs; the
        judges; `accuracy`, what training reached of its own reward; `wins`, see there. The first seven are means over
        `bundles`, which are their items.
    """
    made = drawn(recipe, inputs, model, seed)
    size = len(made.prompts) // (len(TASKS) + 1)
    texts = [
        [prompt.fields["prompt"] for prompt in made.prompts[i : i + size]] for i in range(0, len(made.prompts), size)
    ]
    scores, known = made.scores(), len(TASKS) * size
    right = dict(zip(TASKS, in_bundles(scores[:known], texts[:-1]), strict=True))
    right["unseen"] = in_bundles(scores[known:], texts[-1:])[0]
    qualities = in_bundles(made.scores("quality")[:known], texts[:-1])
    bundles = {**right, "quality": qualities.mean(0), "scene_quality": qualities[TASKS.index("scene")]}
    bundles["mean"] = (right["count"] + right["glyph"] + bundles["quality"]) / 3
    figures: Figures = {name: float(values.mean()) for name, values in bundles.items()}
    figures["items"] = {
        name: {f"bundle-{i}": float(value) for i, value in enumerate(values)} for name, values in bundles.items()
    }
    figures |= by_number(made.prompts[:size], scores[:size])
    figures |= judged(made, inputs["judges"]) | divergence(made)
    if trained is not None:
        record = figures_of(inputs[trained])
        figures |= {name: record[name] for name in (*COSTS, "accuracy", "curve")}
    else:
        figures |= dict.fromkeys(COSTS, 0.0)
    figures["expert_cpu_seconds"] = sum(figures_of(inputs[name])["cpu_seconds"] for name in experts)
    if draws:
        own = successes(recipe, inputs, model, seed, draws)
        figures["wins"] = wins(own, figures_of(inputs["experts drawn"])["successes"], draws)
    if way:
        first, last = (figures_of(inputs[name])["curve"][i]["accuracy"] for name, i in zip(way, (0, -1), strict=True))
        figures |= reached(figures["curve"], "accuracy", first + 0.9 * (last - first))
        figures["sampled_tokens_to_goal"] += spent
    return figures


def in_bundles(scores: np.ndarray, texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean scores `[sets, bundles]` of sets of prompts that lie one after the other. Prompts of equal text are in one
    bundle, since pictures of one text succeed or fail together; there are as many bundles as the set with the fewest
    different texts has of them."""
    orders = [sorted(set(of_set)) for of_set in texts]
    number = min(map(len, orders))
    means, first = [], 0
    for of_set, order in zip(texts, orders, strict=True):
        place = np.array([order.index(text) % number for text in of_set])
        own = scores[first : first + len(of_set)]
        means.append([own[place == bundle].mean() for bundle in range(number)])
        first += len(of_set)
    return np.array(means)


def divergence(made: Drawn) -> Figures:
    """`kl` from the run's first teacher, its logarithm `log_kl`, and `kl_step_K` of each step, on the model's own SDE;
    `kl_experts` and `log_kl_experts` on the SDE of that teacher."""
    run, grid = made.run, made.run.recipe.rollout
    own = _by_step(run, grid)
    theirs = _by_step(run, grid.model_copy(update={"teacher": run.teachers[0].settings.name}))
    figures: Figures = {f"kl_step_{k}": value for k, value in enumerate(own)}
    for name, steps in (("kl", own), ("kl_experts", theirs)):
        kl = sum(steps) / len(steps)
        figures |= {name: kl, f"log_{name}": math.log(max(kl, 1e-12))}
    return figures


def _by_step(run: Run, grid: Any) -> list[float]:
    """Mean divergence of each step along the trajectories of a rollout, from the run's first teacher."""
    source, now = grid.build(run.context, run.student, run.teachers), run.at(0)
    walked = source(Request(run.held_out, 1, grid.budget, STREAM, grid, now.context))
    parts, settings = [], now.recipe.teacher[0]
    with torch.no_grad():
        for micro, _ in walked.split(64):
            own = run.student(micro)
            theirs = answers_of(run.teachers[0], micro, settings, now.context)[0].distribution
            assert isinstance(own, Gaussian)
            assert isinstance(theirs, Gaussian)
            parts.append(own.kl(theirs).view(-1, grid.budget))
    return list(torch.cat(parts).double().mean(0).tolist())


def gradients(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], batches: int, seed: int
) -> Figures:
    """How far the gradient of the recipe's objective goes `along` that of the divergence itself.

    That of the divergence is the mean of `kl_direct` over `batches` steps' trajectories; the objective's is the mean
    over as many others, so that what is random in one is not in the other. `along` is their inner product over the
    squared length of the first: 1 where both have one expectation and enough batches, 0 where the objective's is zero.
    """
    run = assembled(parse_recipe({**filled(recipe, inputs), "seed": seed, "tracking": {"trackers": []}}, "recipe"))
    own = run.recipe.objective[0]
    direct = GaussianKL(teacher=own.teacher)
    truth = _gradient(run, direct, range(batches))
    found = _gradient(run, own, range(batches, 2 * batches))
    return {**dict.fromkeys(COSTS, 0.0), "along": float((found @ truth) / (truth @ truth))}


def _gradient(run: Run, objective: Objective, streams: Iterable[int]) -> torch.Tensor:
    """Mean over the trajectories of several steps, float64, all weights in one vector."""
    trained = [p for p in run.student.module.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
    streams = list(streams)
    for stream in streams:
        draw = run.course.next(stream, {}, None)
        assert draw is not None
        prompts = count_repeats(draw.prompts)
        now = run.at(0)
        walked = run.rollout(now.request(prompts, stream=stream))
        answers = run.ask(walked, now)
        weights = objective.position_weights(walked, run.recipe.reduction, run.sum_over_processes)
        for micro, here in walked.split(run.micro):
            heard = objective.heard([answer.select(here) for answer in answers])
            loss = objective(run.student(micro), heard, weights[here], micro)
            parts = torch.autograd.grad(loss.total, trained, allow_unused=True, materialize_grads=True)
            total += torch.cat([part.flatten() for part in parts]).double()
    return total / len(streams)


def make_judges(
    folder: Path, inputs: Mapping[str, Path], *, prompts: Sequence[Mapping[str, Any]], steps: int, seed: int
) -> Figures:
    """The classifier whose features the Frechet distance compares, trained on the pictures of the blocks `prompts`; and
    those pictures, each once, to be near to."""
    rows = [row for block in prompts for _, row in DrawingPrompts(**block).rows()]
    classifier = train_classifier(rows, steps=steps, seed=seed)
    (folder / "symbols.json").write_text(json.dumps(classifier.symbols), encoding="utf-8")
    renders = torch.from_numpy(np.unique(np.stack([row["image"] for row in rows]), axis=0))
    save_file({"renders": renders, **classifier.state_dict()}, folder / "judges.safetensors")
    return {}


def judged(made: Drawn, judges: Path) -> Figures:
    """`entropy` of the backgrounds of count and glyph, where no prompt names one; `sharpness`; `novelty`, the distance
    to the nearest picture that the base learnt from; `frechet` distance to the references of the same prompts."""
    held = load_file(judges / "judges.safetensors")
    renders = held.pop("renders").numpy().astype(np.float32) / 255
    classifier = Classifier(json.loads((judges / "symbols.json").read_text(encoding="utf-8")))
    classifier.load_state_dict(held)
    free = [i for i, prompt in enumerate(made.prompts) if prompt.fields["task"] != "scene"]
    references = np.stack([prompt.fields["image"] for prompt in made.prompts]).astype(np.float32) / 255
    return {
        "entropy": background_entropy(made.pictures[free]),
        # Pictures without an edge have no sharpness of their own and count as blurred.
        "sharpness": float(np.nan_to_num(edge_sharpness(made.pictures)).mean()),
        "novelty": float(nearest_distance(made.pictures, renders).mean()),
        "frechet": frechet_distance(classifier.features(made.pictures), classifier.features(references)),
    }


def experts_drawn(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    models: Mapping[str, str],
    recipe: Mapping[str, Any],
    draws: int,
    seed: int,
) -> Figures:
    """`successes` of every expert on every prompt."""
    return {"successes": {name: successes(recipe, inputs, model, seed, draws) for name, model in models.items()}}


def samples_of_experts(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    models: Mapping[str, str],
    recipe: Mapping[str, Any],
    size: int,
    seed: int,
) -> Figures:
    """`size` pictures of each task by its own expert, in `folder/rows.jsonl`, for fine-tuning."""
    start = time.process_time()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for task, model in models.items():
            asked = merged(recipe, {"evaluation": {"prompts": [drawings(task, size)]}})
            made = drawn(asked, inputs, model, seed)
            for i, (prompt, picture) in enumerate(zip(made.prompts, made.pictures, strict=True)):
                place = (folder / f"{task}-{i}.png").resolve()
                Image.fromarray((picture * 255).round().astype(np.uint8)).save(place)
                file.write(json.dumps({**prompt.fields, "image": str(place)}) + "\n")
    return {"cpu_seconds": time.process_time() - start}


def successes(
    recipe: Mapping[str, Any], inputs: Mapping[str, Path], model: str, seed: int, draws: int
) -> dict[str, int]:
    """How many of `draws` pictures are right, for every different text of the first two held-out sets."""
    few = merged(recipe, {"evaluation": {"prompts": recipe["evaluation"]["prompts"][:2]}})
    run = opened(few, inputs, model, seed)
    first = {prompt.fields["prompt"]: prompt for prompt in reversed(run.held_out)}
    made = drawn_of(run, list(first.values()), draws)
    right = made.scores().reshape(-1, draws).sum(1)
    return {prompt.id: int(count) for prompt, count in zip(made.prompts[::draws], right, strict=True)}


def wins(own: Mapping[str, int], experts: Mapping[str, Mapping[str, int]], draws: int) -> float:
    """Prompts on which a model is right more often than *every* expert: Fisher's exact test, one-sided, the largest of
    the p-values against each expert; false discovery rate 5 % over prompts (Benjamini and Hochberg 1995)."""
    values = [max(_p_value(count, other[name], draws) for other in experts.values()) for name, count in own.items()]
    return float((false_discovery_control(values) <= 0.05).sum())


def _p_value(own: int, other: int, draws: int) -> float:
    table = [[own, draws - own], [other, draws - other]]
    return float(fisher_exact(table, alternative="greater").pvalue)


def figures_of(folder: Path) -> Figures:
    """What a finished stage measured."""
    record: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return dict(record["figures"])
