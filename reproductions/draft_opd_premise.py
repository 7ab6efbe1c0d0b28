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
        of supervised training in texts drawn as those that were learnt, and `last_quarter_greedy` in greedy ones;
        `restart`, its gain from the new start. Gains are shares.
    """
    before, after = figures_of(inputs[start]), figures_of(inputs[again])
    gained = {AT[name]: before[name] / before[f"earlier_{name}"] - 1 for name in TEMPERATURES}
    return {
        "share_of_block": {AT[name]: before[name] / DRAFTER["block"] for name in TEMPERATURES},
        "last_quarter": gained[AT[SAMPLED]],
        "last_quarter_greedy": gained[AT[GREEDY]],
        "restart": {AT[name]: after[f"validation_{name}"] / before[name] - 1 for name in TEMPERATURES},
    }


def room(folder: Path, inputs: Mapping[str, Path], *, start: str, of: Sequence[str]) -> Figures:
    """The gain of the best drafter that was trained on from the stage `start` while rates were chosen, as a share, at
    either temperature; and the gain of each."""
    before = figures_of(inputs[start])
    gains = {
        name: {AT[figure]: figures_of(inputs[name])[figure] / before[figure] - 1 for figure in TEMPERATURES}
        for name in of
    }
    return {"room": {at: max(gain[at] for gain in gains.values()) for at in AT.values()}, "gains": gains}


GATES = [
    Gate("premise", "share_of_block", at_least=0.3, worst=True),
    Gate("premise", "share_of_block", at_most=0.6, worst=True),
    Gate("premise", "last_quarter", at_most=0.02),
    Gate("premise", "restart", at_most=0.01, worst=True),
    Gate("room", "room", at_least=0.02, worst=True),
]
