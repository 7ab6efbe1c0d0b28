"""What the jobs of Lightning OPD's experiments do: write and score stores, train on them or live, test, and compare."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd.distributions import Sampled
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.recipe import Recipe, parse_recipe
from opd.reproductions import train
from opd.reproductions.definition import COSTS, Figures
from opd.reproductions.training import filled
from opd.store import Store, Targets
from reproductions.lightning_opd_gap import gap
from reproductions.on_policy import at_rate
from reproductions.running_sum import figures_of, tested

Test = Mapping[str, Any]
"""An `evaluation` block."""


def skills(folder: Path, inputs: Mapping[str, Path], *, test: Test, seed: int) -> Figures:
    """Accuracy of every teacher at temperature 1, the `lowest`, and how far they lie apart, the `spread`."""
    found = {}
    for name, place in inputs.items():
        (folder / name).mkdir()
        figures = tested(folder / name, {"of": place}, student="{of}/run/student", test=test, seed=seed)
        found[name] = figures["test_accuracy"]
    return {**found, "spread": max(found.values()) - min(found.values()), "lowest": min(found.values())}


# -- stores ------------------------------------------------------------------------------------------------------------


def written(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    scored_by: Mapping[str, Mapping[str, Any]] | None = None,
    draws: int = 1,
    seed: int,
) -> Figures:
    """`opd rollout`, then `opd score` for each of `scored_by`, in `folder/store`.

    Args:
        scored_by: name of the targets to the name of the `teacher`, and `kind` and options.

    Returns:
        `cpu_seconds` of the rollouts and `score_cpu_seconds NAME` of each scoring, loading included; `sampled_tokens`;
        and `distance NAME`, of each teacher to the first.
    """
    settings = {"tracking": {"trackers": []}, **filled(recipe, inputs), "seed": seed, "output": str(folder / "run")}
    start = time.process_time()
    store = sample(parse_recipe(settings, "recipe of this store"), folder / "store", draws=draws, quiet=True)
    figures = {"cpu_seconds": time.process_time() - start}
    tokens = sum(int(store.shard(shard).lengths.sum()) for shard in range(store.header.shards))
    figures |= {"sampled_tokens": float(tokens)}
    for name, options in (scored_by or {}).items():
        own = dict(options)
        place = str(inputs[f"teacher {own.pop('teacher')}"] / "run" / "student")
        start = time.process_time()
        score(with_teacher(settings, place), store.path, name=name, quiet=True, **own)
        figures[f"score_cpu_seconds {name}"] = time.process_time() - start
    sampled = [name for name, options in (scored_by or {}).items() if options.get("kind", "sampled") == "sampled"]
    return figures | {f"distance {name}": distance(store, sampled[0], name) for name in sampled}


def with_teacher(settings: Mapping[str, Any], model: str) -> Recipe:
    return parse_recipe({**settings, "teacher": [{"model": model, "template": "plain"}]}, "recipe of these targets")


def distance(store: Store, one: str, other: str) -> float:
    """sigma_Delta: root of the mean over trajectories of the squared sum of `|log p(a_t) - log p'(a_t)|`."""
    rows = range(store.header.rows)
    lengths = [len(store.row(row).actions) for row in rows]
    answers = [Targets.open(store, name).answer(rows, lengths) for name in (one, other)]
    log_p, log_other = (answer.log_probs for answer in answers if isinstance(answer, Sampled))
    sums = [part.abs().sum() for part in torch.split(log_p - log_other, lengths)]
    return float(torch.stack(sums).square().mean().sqrt())


# -- training ----------------------------------------------------------------------------------------------------------


def distilled(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    rate: float | str,
    test: Test,
    store: str = "",
    measure_gap: bool = False,
    seed: int,
) -> Figures:
    """Train a student, and test it.

    Args:
        rate: the learning rate at the start, or the stage that chose one.
        store: the stage whose store is trained on. The cost then holds what its rollouts and these targets took, and
            the curve begins there.
        measure_gap: also how far the offline gradient lies from the online one at the trained student, of
            `reproductions.lightning_opd_gap`.
    """
    inputs = dict(inputs)
    start = rate if isinstance(rate, float) else figures_of(inputs.pop(rate))["rate"]
    figures = train(folder, inputs, recipe=at_rate(recipe, start), seed=seed)
    # What a run holds out answered for its curve alone: the test has prompts of its own.
    figures = {name: value for name, value in figures.items() if name != "items"} | {"rate": start}
    student = {"of": folder}
    if store:
        answers = recipe["teacher"][0]
        made, targets = figures_of(inputs[store]), answers["targets"]
        tokens = made["sampled_tokens"]
        spent = {
            "cpu_seconds": made["cpu_seconds"] + made[f"score_cpu_seconds {targets}"],
            "sampled_tokens": tokens,
            "teacher_tokens": tokens,
        }
        for record in (figures, *figures["curve"]):
            record |= {name: record[name] + spent[name] for name in COSTS}
        figures |= {"sigma_delta": made.get(f"distance {targets}", 0.0), **late(folder / "run")}
        if measure_gap:
            figures |= gap(
                folder / "run" / "student", filled(recipe, inputs), inputs[store] / "store", targets, seed=seed
            )
    return figures | tested(folder, student, student="{of}/run/student", test=test, seed=seed)


LATE = {
    "drift": "drift_in_sample",
    "drift_std": "drift_std_in_sample",
    "advantage_size": "advantage_size",
    "clamped": "clamped",
}
"""What is kept of the last steps, by its name in the log."""


def late(run: Path) -> dict[str, float]:
    """Means over the last quarter of a run's steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "train/loss" in record]
    steps = steps[-max(1, len(steps) // 4) :]
    found = {}
    for name, called in LATE.items():
        values = [record[f"train/{name}"] for record in steps if f"train/{name}" in record]
        found |= {called: sum(values) / len(values)} if values else {}
    return found


def untrained(folder: Path, inputs: Mapping[str, Path], *, of: str, test: Test, seed: int) -> Figures:
    """A fine-tuned student as it is: it has not moved, and cost nothing more."""
    found = tested(folder, inputs, student=f"{{{of}}}/run/student", test=test, seed=seed)
    return {**found, **dict.fromkeys(COSTS, 0.0), "drift_in_sample": 1.0, "drift_std_in_sample": 0.0}


# -- arms --------------------------------------------------------------------------------------------------------------


def chosen(choice: Mapping[str, str], inputs: Mapping[str, Path]) -> dict[str, str]:
    """Learning rates as the names of stages have them."""
    return {figure: f"{figures_of(inputs[stage])[figure]:g}" for figure, stage in choice.items()}


def compared(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    of: str,
    beside: str,
    start: str,
    sft: Sequence[str],
    choice: Mapping[str, str],
    curve: bool,
    seed: int,
) -> Figures:
    """What a student measured, and what that is beside live distillation and the student that both began from.

    Args:
        of: the stage that trained and tested it.
        beside: that of the live student that it is held against.
        start: that of the fine-tuned student.
        sft: the stages that made that one; what they took counts as `sft_cpu_seconds`.
        choice: figures that are learning rates, and the stage of each; in `of` and `beside` `{FIGURE}` stands for the
            rate.
        curve: whether the arm's curve is kept.

    Returns:
        Besides the student's own figures: `gain` over the start, `share_of_live_gain` that it keeps, `behind_live`, and
        its CPU seconds as shares of live's, `cost_of_live`, and with the fine-tuning's on both sides,
        `cost_of_live_with_sft`.
    """
    rates = chosen(choice, inputs)
    own, online = (figures_of(inputs[name.format(**rates)]) for name in (of, beside))
    before = figures_of(inputs[start])["test_accuracy"]
    made = sum(figures_of(inputs[stage])["cpu_seconds"] for stage in sft)
    own = {name: value for name, value in own.items() if curve or name != "curve"}
    gain, reached = own["test_accuracy"] - before, online["test_accuracy"] - before
    return {
        **own,
        "gain": gain,
        # A live student that gained nothing leaves nothing to keep a share of; the gate wants five points of it.
        "share_of_live_gain": gain / reached if reached > 0 else 0.0,
        "behind_live": reached - gain,
        "sft_cpu_seconds": made,
        "cost_of_live": own["cpu_seconds"] / online["cpu_seconds"],
        "cost_of_live_with_sft": (own["cpu_seconds"] + made) / (online["cpu_seconds"] + made),
    }


def pooled(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    of: Sequence[str],
    against: Sequence[str] = (),
    choice: Mapping[str, str],
    seed: int,
) -> Figures:
    """Means over the students of several stages, named as in `compared`; with `against` also `lost`, how much more
    accurate those are."""
    rates = chosen(choice, inputs)

    def means(names: Sequence[str]) -> dict[str, float]:
        found = [figures_of(inputs[name.format(**rates)]) for name in names]
        shared = [n for n, v in found[0].items() if isinstance(v, float) and all(n in other for other in found)]
        return {name: sum(one[name] for one in found) / len(found) for name in shared}

    own = means(of)
    return {**own, "lost": means(against)["test_accuracy"] - own["test_accuracy"]} if against else own
