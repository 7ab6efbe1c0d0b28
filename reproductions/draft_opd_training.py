"""How the drafters of this reproduction are trained, and how long their blocks stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.api import assembled, export
from opd.asking import RunAsker
from opd.drafting.record import acceptance_length
from opd.measurement import Clock
from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from opd.reproductions import train
from opd.reproductions.definition import COSTS, Figures, merged
from opd.reproductions.training import filled
from opd.rollouts.speculative import SpeculativeRollout
from reproductions.draft_opd_controls import Misplaced
from reproductions.draft_opd_models import ANSWERS, CAP, DRAFTER, OF_TARGET, SAVED, prompts, recipe
from reproductions.on_policy import at_rate
from reproductions.running_sum import figures_of

BATCH, PER_TEXT = 16, 15
SLOT_DECAY = 0.7788
"""`exp(-1/4)`: of the slots of supervised blocks."""

MISPLACED = Misplaced.model_fields["kind"].default
"""The kind of its rollout, imported here so that every job knows it."""

GREEDY, SAMPLED = "acceptance_length_greedy", "acceptance_length_sampled"
TEMPERATURES = {GREEDY: 0.0, SAMPLED: 1.0}
"""Of the target's texts."""

SUPERVISED: dict[str, Any] = {
    "rollout": {"anchors": "uniform", "per_text": PER_TEXT, "slots": "text"},
    "objective": [{"kind": "cross_entropy", "decay": SLOT_DECAY}],
}
"""What supervised training changes of an arm: the text's own tokens at random anchors, and cross-entropy."""


def drafted(student: Mapping[str, Any], steps: int, rate: float, answers: str, **changes: Any) -> dict[str, Any]:
    """Training of a drafter on what the target wrote to the prompts of the file `answers`."""
    own: dict[str, Any] = {
        "prompts": {"kind": "file", "path": f"{{{ANSWERS}}}/{answers}.jsonl"},
        "teacher": {"kind": "target"},
        "rollout": {"kind": "anchored", "texts": {"kind": "data", "max_new_tokens": CAP}},
        "batch": {"prompts": BATCH, "micro": BATCH},
        "evaluation": {"prompts": prompts("validation", 8), "temperature": 1.0},
    }
    block = recipe({"kind": "draft", "target": OF_TARGET, **student}, steps, rate)
    return merged(merged(block, own), changes)


def new(steps: int, rate: float) -> dict[str, Any]:
    """Supervised training of a new drafter."""
    return drafted({"drafter": DRAFTER}, steps, rate, "taught", **SUPERVISED)


def going_on(start: str, steps: int, answers: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """More training of the drafter of the stage `start`; the learning rate is put in when it is known."""
    return merged(drafted({"model": f"{{{start}}}/{SAVED}"}, steps, 0.0, answers), changes)


# -- the jobs ----------------------------------------------------------------------------------------------------------


def acceptance(
    folder: Path, inputs: Mapping[str, Path], drafter: Path, *, of: Mapping[str, int], seed: int, tokens: int = CAP
) -> dict[str, Figures]:
    """Acceptance lengths of a drafter, `GREEDY` and `SAMPLED`, on so many prompts of each of the files `of`, whose
    texts end after `tokens` at most.

    At a temperature of 1 the target's texts depend on `seed` and not on the drafter, so that drafters are compared on
    the same texts.
    """
    block = recipe(
        {"kind": "draft", "target": OF_TARGET, "model": str(drafter)},
        1,
        0.0,
        prompts=[prompts(name, size) for name, size in of.items()],
        teacher={"kind": "target"},
        rollout={"kind": "speculative", "max_new_tokens": tokens},
        objective=["accepted"],
        evaluation={"prompts": prompts("train", 2)},
        tracking={"trackers": []},
        seed=seed,
    )
    run = assembled(
        parse_recipe({**filled(block, inputs), "output": str(folder / "measured")}, "recipe of this measurement")
    )
    run.student.module.eval()
    asker, asked = RunAsker(run, Clock()), load_prompts(run.recipe.prompts)
    found: dict[str, Figures] = {name: {} for name in of}
    for figure, temperature in TEMPERATURES.items():
        how = SpeculativeRollout(text_temperature=temperature, max_new_tokens=tokens, batch=512)
        made = asker.roll_out(asked, by=how)
        for i, name in enumerate(of):
            mine = [record for prompt, record in zip(asked, made.contexts, strict=True) if prompt.source == i]
            found[name][figure] = acceptance_length(mine)
    return found


def started(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    size: int,
    seed: int,
    tokens: int = CAP,
) -> Figures:
    """A drafter from supervised training; its acceptance lengths on validation prompts, and under `earlier_...` those
    of a quarter before its end."""
    steps = recipe["steps"]
    quarters = merged(recipe, {"checkpoint": {"every": steps // 4, "keep_last": 5}})
    figures = train(folder, inputs, recipe=quarters, seed=seed)
    earlier = export(folder / "run", folder / "earlier", step=3 * (steps // 4))
    for name, place in (("", folder / SAVED), ("earlier_", earlier)):
        measured = acceptance(folder, inputs, place, of={"validation": size}, seed=seed, tokens=tokens)
        figures |= {f"{name}{figure}": value for figure, value in measured["validation"].items()}
    return figures


def trained(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    rate: str,
    validation: int,
    test: int,
    seed: int,
    tokens: int = CAP,
) -> Figures:
    """Train a drafter on at the rate that the stage `rate` chose; its acceptance lengths are `test_...`, and on
    validation prompts `validation_...`."""
    chosen = figures_of(inputs[rate])["rate"]
    figures = train(folder, inputs, recipe=at_rate(recipe, chosen), seed=seed)
    of = {"validation": validation, "test": test}
    measured = acceptance(folder, inputs, folder / SAVED, of=of, seed=seed, tokens=tokens)
    figures |= {f"{name}_{figure}": value for name, each in measured.items() for figure, value in each.items()}
    # Training is watched on a few prompts only, which make no curve.
    return {**{name: value for name, value in figures.items() if name != "curve"}, "rate": chosen}


def untouched(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    start: str,
    validation: int,
    test: int,
    seed: int,
    tokens: int = CAP,
) -> Figures:
    """The drafter of the stage `start`, measured as `trained` does; its cost is that of its supervised training."""
    of = {"validation": validation, "test": test}
    measured = acceptance(folder, inputs, inputs[start] / SAVED, of=of, seed=seed, tokens=tokens)
    figures = {f"{name}_{figure}": value for name, each in measured.items() for figure, value in each.items()}
    return {**figures, **{name: figures_of(inputs[start])[name] for name in COSTS}}


def best_rate(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    rates: Sequence[float],
    size: int,
    seed: int,
    tokens: int = CAP,
) -> Figures:
    """Every rate once, from a start and with a seed that no arm has. The best is that with the largest sum of
    acceptance lengths at both temperatures, on validation prompts; its lengths are among the figures."""
    found: dict[float, Figures] = {}
    for rate in rates:
        place = folder / f"{rate:g}"
        place.mkdir()
        train(place, inputs, recipe=at_rate(recipe, rate), seed=seed)
        measured = acceptance(place, inputs, place / SAVED, of={"validation": size}, seed=seed, tokens=tokens)
        found[rate] = measured["validation"]
    best = max(found, key=lambda rate: sum(found[rate].values()))
    return {
        "rate": best,
        **found[best],
        **{f"{name} at {rate:g}": value for rate, each in found.items() for name, value in each.items()},
    }


def best_of(folder: Path, inputs: Mapping[str, Path], *, of: Sequence[str], seed: int) -> Figures:
    """What was measured of the one of several drafters of this seed with the largest sum of acceptance lengths on
    validation prompts."""
    every = [figures_of(inputs[name]) for name in of]
    return max(every, key=lambda figures: sum(figures[f"validation_{name}"] for name in TEMPERATURES))
