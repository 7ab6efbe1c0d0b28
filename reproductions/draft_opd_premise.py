"""The premise of Draft-OPD, measured before any arm is compared: supervised training has ended at a plateau, and better
drafters of the same form exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from opd.reproductions import Gate
from opd.reproductions.definition import Figures
from reproductions.draft_opd_models import DRAFTER
from reproductions.draft_opd_training import GREEDY, SAMPLED, TEMPERATURES
from reproductions.running_sum import figures_of

AT = {name: name.removeprefix("acceptance_length_") for name in TEMPERATURES}


def premise(folder: Path, inputs: Mapping[str, Path], *, start: str, again: str, seed: int) -> Figures:
    """Of the drafters of one seed, on validation prompts.

    Args:
        start: the stage of the drafter after supervised training.
        again: the stage that trained it on in the same way, with a fresh optimiser and schedule.

    Returns:
        `share_of_block`, the acceptance length as a share of the block; `last_quarter`, its gain over the last quarter
        of supervised training; `restart`, its gain from the new start; each in drawn texts, and with `_greedy` behind
        the name in greedy ones. Gains are shares.
    """
    before, after = figures_of(inputs[start]), figures_of(inputs[again])
    found: Figures = {}
    for name, of in ((SAMPLED, ""), (GREEDY, "_greedy")):
        found[f"share_of_block{of}"] = before[name] / DRAFTER["block"]
        found[f"last_quarter{of}"] = before[name] / before[f"earlier_{name}"] - 1
        found[f"restart{of}"] = after[f"validation_{name}"] / before[name] - 1
    return found


def room(folder: Path, inputs: Mapping[str, Path], *, start: str, of: Sequence[str]) -> Figures:
    """The gain of the best drafter that was trained on from the stage `start` while rates were chosen, as a share, in
    drawn texts; and the gain of each at either temperature."""
    before = figures_of(inputs[start])
    gains = {
        name: {AT[figure]: figures_of(inputs[name])[figure] / before[figure] - 1 for figure in TEMPERATURES}
        for name in of
    }
    return {"room": max(gain[AT[SAMPLED]] for gain in gains.values()), "gains": gains}


GATES = [
    Gate("premise", "share_of_block", at_least=0.3),
    Gate("premise", "share_of_block", at_most=0.6),
    Gate("premise", "last_quarter", at_most=0.02),
    Gate("premise", "restart", at_most=0.01),
    Gate("room", "room", at_least=0.02),
]
