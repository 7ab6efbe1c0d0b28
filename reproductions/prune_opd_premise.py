"""The premise of Prune-OPD, measured before any arm: with one teacher overlap falls along the student's answers, with
the other it does not.

    python -m reproductions.prune_opd_premise runs/prune-opd-premise
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.api import assembled
from opd.evaluation import evaluate
from opd.procedural import ANSWER_PATTERN
from opd.recipe import parse_recipe
from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from reproductions.prune_opd_models import CAP, SAVED, STAGES, STUDENT, TEACHER_C, TEACHER_D, TERMS
from reproductions.running_sum import QUARTERS, prompts

K = 4
"""Candidates of each side that are compared, of the 19 tokens that there are: chance is 0.21."""
TAUS = (0.5, 0.75, 1.0)
PAIRS = {"d": TEACHER_D, "c": TEACHER_C}
ROLLOUTS = 512

Rollout = dict[str, Any]
"""`prompt` and `completion` ids, `digits` of the problem, `right`, `finished`."""


def rollouts(folder: Path, model: Path, size: int, seed: int) -> tuple[list[Rollout], float]:
    """One answer at temperature 1 to each of `size` held-out problems, and the share of greedy answers that are
    right."""
    settings = {
        "student": {"model": str(model), "template": "plain"},
        "prompts": prompts(TERMS, 2, "train"),
        "objective": ["sft"],
        "rollout": {"kind": "data"},
        "verifier": {"kind": "exact_match", "pattern": ANSWER_PATTERN},
        "evaluation": {
            "prompts": prompts(TERMS, size, "validation", seed=1),
            "max_new_tokens": CAP,
            "samples": 0,
            "greedy": True,
        },
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
        "seed": seed,
        "output": str(folder),
    }
    ids = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids
    found = evaluate(assembled(parse_recipe(settings, "recipe of the premise")))
    written = [
        {
            "prompt": ids(list(row["prompt"])),
            "completion": ids(row["tokens"]),
            "digits": len(row["prompt"]) - 1,
            "right": row["reward"],
            "finished": row["finished"],
        }
        for row in found.rows
    ]
    return written, found.metrics["greedy_accuracy"]


@torch.no_grad()
def candidates(model: Path, written: Sequence[Rollout]) -> list[torch.Tensor]:
    """int64 `[T, K]` for each rollout: the K most likely tokens at each of its T positions."""
    language = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    longest = max(len(r["prompt"]) + len(r["completion"]) for r in written)
    ids = torch.zeros(len(written), longest, dtype=torch.int64)
    for i, r in enumerate(written):
        ids[i, : len(r["prompt"]) + len(r["completion"])] = torch.tensor(r["prompt"] + r["completion"])
    # Padding stands on the right, where a causal model does not see it.
    top = language(input_ids=ids).logits.topk(K).indices
    starts = [len(r["prompt"]) - 1 for r in written]
    ends = [start + len(r["completion"]) for start, r in zip(starts, written, strict=True)]
    return [top[i, start:end] for i, (start, end) in enumerate(zip(starts, ends, strict=True))]


def overlap(own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """float32 `[T]`: shared ids of two `[T, K]`, as a share of K; probabilities do not enter."""
    return (own[:, :, None] == others[:, None, :]).any(-1).float().mean(-1)


def by_quarter(overlaps: Sequence[torch.Tensor]) -> tuple[list[float], float, float]:
    """Mean overlap over the positions in each quarter of their rollouts, how far it falls from the first quarter to the
    last, and the standard error of that fall, with rollouts as clusters."""
    sums, counts = torch.zeros(len(overlaps), QUARTERS), torch.zeros(len(overlaps), QUARTERS)
    for i, values in enumerate(overlaps):
        quarter = torch.arange(len(values)) * QUARTERS // len(values)
        sums[i].index_add_(0, quarter, values)
        counts[i].index_add_(0, quarter, torch.ones_like(values))
    means = sums.sum(0) / counts.sum(0)
    # A ratio of sums over clusters: residuals of each cluster, divided by the mean count.
    residuals = (sums - counts * means) / counts.mean(0)
    error = (residuals[:, 0] - residuals[:, -1]).std() / len(overlaps) ** 0.5
    return means.tolist(), float(means[0] - means[-1]), float(error)


def events(overlaps: Sequence[torch.Tensor], tau: float) -> list[float]:
    """Share of positions with an overlap below `tau`, in each quarter of their rollouts."""
    return by_quarter([(values < tau - 1e-6).float() for values in overlaps])[0]


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int, seed: int) -> Figures:
    """What decides whether the claims can be tested on these models.

    Returns:
        `student_accuracy`, `accuracy_d`, `accuracy_c` and the student's by length class, `accuracy_by_class`;
        `length`, `length_p50`, `length_p90` and `cut`, the share without an end; of each pair `fall_d` and `fall_c` by
        length class (their worst decides), `fall_se_d`, `quarters_d` (of all, and by class) and `events_d`, the share
        of drift events in each quarter by tau. A pair's figures are on the student's own answers.
    """
    written, greedy = rollouts(folder / "student", inputs[STUDENT] / SAVED, size, seed)
    classes = sorted({r["digits"] for r in written})
    lengths = torch.tensor([float(len(r["completion"])) for r in written])
    figures: Figures = {
        "student_accuracy": share(written, "right"),
        "student_greedy": greedy,
        "accuracy_by_class": {str(n): share([r for r in written if r["digits"] == n], "right") for n in classes},
        "length": float(lengths.mean()),
        "length_p50": float(lengths.quantile(0.5)),
        "length_p90": float(lengths.quantile(0.9)),
        "cut": 1 - share(written, "finished"),
    }
    own = candidates(inputs[STUDENT] / SAVED, written)
    for pair, teacher in PAIRS.items():
        place = inputs[teacher] / SAVED
        answers, greedy = rollouts(folder / teacher, place, size, seed)
        pairs = zip(own, candidates(place, written), strict=True)
        overlaps = [overlap(mine, others) for mine, others in pairs]
        of_class = {
            str(n): by_quarter([o for o, r in zip(overlaps, written, strict=True) if r["digits"] == n]) for n in classes
        }
        figures |= {
            f"accuracy_{pair}": share(answers, "right"),
            f"greedy_{pair}": greedy,
            f"quarters_{pair}": {"all": by_quarter(overlaps)[0], **{n: found[0] for n, found in of_class.items()}},
            f"fall_{pair}": {n: found[1] for n, found in of_class.items()},
            f"fall_se_{pair}": {n: found[2] for n, found in of_class.items()},
            f"events_{pair}": {f"{tau:g}": events(overlaps, tau) for tau in TAUS},
        }
    return figures


def share(written: Sequence[Rollout], name: str) -> float:
    return sum(float(r[name]) for r in written) / len(written)


STAGE = Stage(premise, {"size": ROLLOUTS, "seed": 7}, [STUDENT, TEACHER_D, TEACHER_C])
GATES = [
    Gate("premise", "student_accuracy", at_least=0.3),
    Gate("premise", "greedy_d", at_least=0.95),
    Gate("premise", "accuracy_c", at_least=0.95),
    Gate("premise", "fall_d", at_least=0.1, worst=True),
    Gate("premise", "fall_c", at_most=0.05, worst=True),
]


def verdict(figures: Figures) -> tuple[bool, list[str]]:
    """Whether the premise holds, and one line for each of its conditions."""
    lines, holds = [], True
    for gate in GATES:
        value, worst = gate.measured("premise", figures)
        passed = gate.passes(value)
        holds &= passed
        where = f" ({worst} digits, the worst class)" if worst else ""
        lines.append(f"{gate.figure}: {value:.3f}{where}, wanted {gate.limit}: {'yes' if passed else 'NO'}")
    lines.append(
        "The premise holds: overlap falls with teacher D and stays with teacher C."
        if holds
        else "The premise does not hold; change the task, not the criterion."
    )
    return holds, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the models where they are missing and measure the premise.")
    parser.add_argument("folder", type=Path, help="gets a folder for each model, and premise.json")
    parser.add_argument("--rollout-seeds", type=int, nargs="+", default=[7], help="one measurement for each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    places: dict[str, Path] = {}
    costs: dict[str, float] = {}
    for name, stage in STAGES.items():
        places[name] = options.folder / name.replace(" ", "-")
        done = places[name] / "job.json"
        if not done.exists():
            places[name].mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            figures = stage.function(places[name], {n: places[n] for n in stage.inputs}, **stage.params)
            record = {"figures": figures, "cpu_seconds": time.process_time() - start}
            done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        costs[name] = json.loads(done.read_text(encoding="utf-8"))["cpu_seconds"]
        print(f"{name}: {costs[name]:.0f} CPU seconds", flush=True)
    found = {}
    for seed in options.rollout_seeds:
        figures = premise(options.folder / "premise", places, **{**STAGE.params, "seed": seed})
        holds, lines = verdict(figures)
        print(f"\nrollout seed {seed}", *lines, sep="\n", flush=True)
        found[str(seed)] = {"holds": holds, "verdict": lines, "figures": figures}
    text = json.dumps({"cpu_seconds": costs, "by_rollout_seed": found}, indent=1)
    (options.folder / "premise.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
