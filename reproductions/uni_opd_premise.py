"""The premise of Uni-OPD, measured before any arm: what experts say of whole answers disagrees with outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from opd.api import assembled
from opd.asking import RunAsker
from opd.evaluation import evaluate
from opd.measurement import Clock
from opd.recipe import parse_recipe
from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures, merged
from opd.reproductions.training import filled
from opd.shaping.margin import margin_of, returns_of
from reproductions.uni_opd_models import CAP, EXPERTS, SAVED, STUDENT, TASKS, prompts, recipe

GROUPS = (4, 8, 16)
COUNTED = 8
"""Answers to a prompt of which the right ones are counted, for the histogram."""


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int, seed: int) -> Figures:
    """What decides whether the claims can be tested on these models, by task.

    Returns:
        `student` and `expert`, accuracies; of 8 answers to each of `size` prompts `never`, `sometimes` and `always`,
        the shares of prompts with none right, some and all, and `histogram`, prompts by the number right; with N
        answers `mixed_N`, the share of prompts with both outcomes, `inverted_N`, the share of those in which a wrong
        answer is above a right one, and `pairs_N`, the share of such pairs; over all 16, `right_return` and
        `wrong_return`, means of G, `margin` and `margin_spread` over mixed prompts, and `spread`, the mean standard
        deviation of G within a prompt.
    """
    found: Figures = {}
    for task in TASKS:
        figures = of_task(folder / task, inputs, task, size, seed)
        for name, value in figures.items():
            # Of a few prompts none may be mixed, which then have no margin.
            if value == value:
                found.setdefault(name, {})[task] = value
    return found


def of_task(folder: Path, inputs: Mapping[str, Path], task: str, size: int, seed: int) -> Figures:
    own = {
        "teacher": {"model": f"{{{EXPERTS[task]}}}/{SAVED}", "template": "plain"},
        "prompts": prompts(task, size, "validation", seed=1),
        "evaluation": {"prompts": prompts(task, size, "validation", seed=1), "max_new_tokens": CAP, "samples": 0},
        "tracking": {"trackers": []},
        "seed": seed,
    }
    block = filled(recipe(f"{{{STUDENT}}}/{SAVED}", 1, 0.0, **own), inputs)
    run = assembled(parse_recipe({**block, "output": str(folder / "student")}, "recipe of the premise"))
    asked = run.held_out
    asker = RunAsker(run, Clock())
    made = asker.roll_out(asked, max(GROUPS))
    assert made.rewards is not None
    returns = returns_of(made, asker.ask(made)).view(size, -1)
    right = (made.rewards >= 1).view(size, -1)
    counts = right[:, :COUNTED].sum(1)
    figures: Figures = {
        "student": float(right.float().mean()),
        "never": float((counts == 0).float().mean()),
        "always": float((counts == COUNTED).float().mean()),
        "sometimes": float(((counts > 0) & (counts < COUNTED)).float().mean()),
        "histogram": torch.bincount(counts, minlength=COUNTED + 1).tolist(),
        "right_return": float(returns[right].mean()),
        "wrong_return": float(returns[~right].mean()),
        "spread": float(returns.std(1).mean()),
    }
    for number in GROUPS:
        figures |= inversions(returns[:, :number], right[:, :number], number)
    alone = merged(block, {"student": {"model": str(inputs[EXPERTS[task]] / SAVED)}, "teacher": []})
    expert = assembled(
        parse_recipe(
            {**alone, "objective": ["sft"], "rollout": {"kind": "data"}, "output": str(folder / "expert")},
            "recipe of the premise",
        )
    )
    return {**figures, "expert": evaluate(expert).metrics["accuracy"]}


def inversions(returns: torch.Tensor, right: torch.Tensor, number: int) -> Figures:
    """Of `[P, N]` returns and who is right: mixed prompts, and how often the returns contradict the outcome there."""
    mixed, inverted, pairs, inverted_pairs, margins = 0, 0, 0, 0, []
    for of_prompt, who in zip(returns, right, strict=True):
        if who.any() and not who.all():
            wrong_way = of_prompt[who][:, None] < of_prompt[~who][None, :]
            mixed += 1
            inverted += int(wrong_way.any())
            pairs += wrong_way.numel()
            inverted_pairs += int(wrong_way.sum())
            margins.append(margin_of(of_prompt, who, ~who, "mean"))
    whole = torch.tensor(margins or [torch.nan])
    return {
        f"mixed_{number}": mixed / len(returns),
        f"inverted_{number}": inverted / max(1, mixed),
        f"pairs_{number}": inverted_pairs / max(1, pairs),
        f"margin_{number}": float(whole.mean()),
        f"margin_spread_{number}": float(whole.std()),
    }


STAGE = Stage(premise, {"size": 256, "seed": 7}, [STUDENT, *EXPERTS.values()])
GATES = [
    Gate("premise", "student", at_least=0.2, worst=True),
    Gate("premise", "student", at_most=0.5, worst=True),
    Gate("premise", "expert", at_least=0.55, worst=True),
    Gate("premise", "expert", at_most=0.85, worst=True),
    Gate("premise", "never", at_least=0.05, worst=True),
    Gate("premise", "always", at_least=0.01, worst=True),
    Gate("premise", "sometimes", at_least=0.3, worst=True),
    Gate("premise", "inverted_8", at_least=0.4, worst=True),
    Gate("premise", "pairs_8", at_least=0.25, worst=True),
]
