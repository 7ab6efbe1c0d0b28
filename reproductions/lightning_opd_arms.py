"""The arms of Lightning OPD's experiment: what is trained, at which rate, and what it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.reproductions import Stage
from opd.reproductions.definition import Figures
from reproductions.lightning_opd_jobs import compared, distilled, pooled, untrained
from reproductions.lightning_opd_models import (
    BATCH,
    BUDGET,
    SAVED,
    SHARES,
    STEPS,
    TERMS,
    fine_tuned,
    fine_tuning,
    live,
    offline,
    sft,
    store,
    store_of,
    stored,
    teacher,
    texts,
)
from reproductions.lightning_opd_premise import RATES, RULE, WAYS
from reproductions.running_sum import figures_of, prompts

FEW_SEEDS = 5
TEST = {"prompts": prompts(TERMS, 500, "test"), "max_new_tokens": BUDGET, "samples": 0, "k": 4, "greedy": True}
LIVE, LIGHTNING = WAYS
SFT, MORE = "SFT", "more SFT"
HIGHEST = max(RATES)
CHOICE = dict.fromkeys(("rate", "best_live", "best_lightning"), RULE)
"""Figures of the rule that stand for a rate in the names of stages."""


def at(way: str, rate: float | str) -> str:
    return f"{way} at {rate:g}" if isinstance(rate, float) else f"{way} at {{{rate}}}"


def student(name: str) -> str:
    return f"student of {name}"


def taught(way: str, of: str, by: str) -> str:
    return f"{way}, SFT {of}, OPD {by}"


# -- what is trained ---------------------------------------------------------------------------------------------------


def matched(**changes: Any) -> dict[str, Any]:
    return offline(sft("A"), store("A"), "A", **changes)


OTHERS = (("A", "B"), ("B", "A"), ("B", "B"))
LONG, THIRD, SIBLING, BARE, WHOLE = (
    "Lightning, 32 passes",
    "Lightning, a third of the steps",
    "Lightning, sibling of A",
    "Lightning, no clamp",
    "Lightning, whole vocabulary",
)
MISMATCHED: dict[str, tuple[str, dict[str, Any]]] = {
    **{taught(LIVE, of, by): (of, live(sft(of), by)) for of, by in OTHERS},
    **{taught(LIGHTNING, of, by): (of, offline(sft(of), store(of), by, consistent=of == by)) for of, by in OTHERS},
}
"""Whose student each begins from, and how it is trained."""
ABLATIONS: dict[str, dict[str, Any]] = {
    LONG: matched(prompts={"size": STEPS * BATCH // 32 + 128}, evaluation={"held_out": 128}),
    THIRD: matched(steps=STEPS // 3),
    SIBLING: offline(sft("A"), store("A"), "A2", consistent=False),
    BARE: matched(objective=[{"kind": "lightning", "clamp": None}]),
    WHOLE: matched(objective=["reverse_kl"], teacher=[{**stored(store("A")), "targets": "exact"}]),
}


def training(block: Mapping[str, Any], of: str, rate: float | str, seeds: int | None = None, **own: Any) -> Stage:
    """Training from the student of `of`, at a rate or at that of the rule, and the test."""
    on_store = bool(block["teacher"]) and block["teacher"][0].get("kind") == "stored"
    place = [store(of)] if on_store else [teacher(name) for name in SHARES if f"{{{teacher(name)}}}" in str(block)]
    params = {"recipe": block, "rate": rate, "test": TEST, **({"store": store(of)} if on_store else {}), **own}
    return Stage(distilled, params, [sft(of), *place, *([rate] if isinstance(rate, str) else [])], True, seeds=seeds)


def further() -> Stage:
    """Fine-tuning on the same texts instead, for as many steps and at the highest rate."""
    block = fine_tuning(f"{{{sft('A')}}}/{SAVED}", texts("A"), STEPS, 0.0, BATCH)
    return Stage(distilled, {"recipe": block, "rate": HIGHEST, "test": TEST}, [sft("A"), texts("A")], per_seed=True)


TRAINED: dict[str, Stage] = {
    **{student(at(LIVE, rate)): training(live(sft("A"), "A"), "A", rate) for rate in RATES},
    **{student(at(LIGHTNING, rate)): training(matched(), "A", rate, measure_gap=True) for rate in RATES},
    **{student(name): training(block, of, RULE, FEW_SEEDS) for name, (of, block) in MISMATCHED.items()},
    **{student(name): training(block, "A", RULE, FEW_SEEDS) for name, block in ABLATIONS.items()},
    student(MORE): further(),
    student(SFT): Stage(untrained, {"of": sft("A"), "test": TEST}, [sft("A")], per_seed=True),
    student(sft("B")): Stage(untrained, {"of": sft("B"), "test": TEST}, [sft("B")], per_seed=True, seeds=FEW_SEEDS),
}
OF_SEEDS: dict[str, Stage] = {
    sft("A"): fine_tuned("A"),
    sft("B"): fine_tuned("B", seeds=FEW_SEEDS),
    store("A"): store_of(
        sft("A"), {**{name: {"teacher": name} for name in SHARES}, "exact": {"teacher": "A", "kind": "exact"}}
    ),
    store("B"): store_of(sft("B"), {name: {"teacher": name} for name in ("B", "A")}, seeds=FEW_SEEDS),
    **TRAINED,
}


# -- what is compared --------------------------------------------------------------------------------------------------


def figured(folder: Path, inputs: Mapping[str, Path], *, of: str, seed: int) -> Figures:
    """What the stage of an arm's student measured; its curve stays there."""
    return {name: value for name, value in figures_of(inputs[of]).items() if name != "curve"}


def candidates(*names: str) -> list[str]:
    """The stages that names may stand for, those at every rate for one that the rule fills in."""
    filled = [n.format(**dict.fromkeys(CHOICE, f"{rate:g}")) for n in names for rate in RATES]
    return list(dict.fromkeys(filled))


def beside_live(of: str, beside: str, curve: bool = False, seeds: int | None = None) -> Stage:
    """An arm of students of teacher A, held against live distillation of theirs."""
    made = [texts("A"), sft("A")]
    params = {"of": of, "beside": beside, "start": student(SFT), "sft": made, "choice": CHOICE, "curve": curve}
    return Stage(compared, params, [*made, RULE, student(SFT), *candidates(of, beside)], seeds=seeds)


def together(way: str, same: bool) -> Stage:
    """The students of A and B under their own teachers, or under each other's."""
    own = [student(at(way, "rate")), student(taught(way, "B", "B"))]
    other = [student(taught(way, "A", "B")), student(taught(way, "B", "A"))]
    params = {"of": own, "choice": CHOICE} if same else {"of": other, "against": own, "choice": CHOICE}
    return Stage(pooled, params, [RULE, *candidates(*own, *other)], seeds=FEW_SEEDS)


def alone(name: str, seeds: int | None = None) -> Stage:
    return Stage(figured, {"of": student(name)}, [student(name)], seeds=seeds)


BEST = {LIVE: "live, best rate", LIGHTNING: "Lightning, best rate"}
SAME, ANOTHER = "{way}, same teacher", "{way}, another teacher"
RULED = student(at(LIVE, "rate"))
ARMS: dict[str, Stage] = {
    SFT: alone(SFT),
    MORE: beside_live(student(MORE), RULED),
    **{way: beside_live(student(at(way, "rate")), RULED, curve=True) for way in WAYS},
    **{BEST[way]: beside_live(student(at(way, f"best_{way.lower()}")), student(at(LIVE, "best_live"))) for way in WAYS},
    **{
        at(way, rate): beside_live(student(at(way, rate)), student(at(LIVE, rate)), curve=rate == HIGHEST)
        for way in WAYS
        for rate in RATES
    },
    sft("B"): alone(sft("B"), FEW_SEEDS),
    **{name: alone(name, FEW_SEEDS) for name in MISMATCHED},
    **{SAME.format(way=way): together(way, same=True) for way in WAYS},
    **{ANOTHER.format(way=way): together(way, same=False) for way in WAYS},
    **{name: beside_live(student(name), RULED, seeds=FEW_SEEDS) for name in ABLATIONS},
}
