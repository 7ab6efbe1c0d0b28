"""Which drafter proposes while one is trained: the same, as it was at the start, or another."""

from __future__ import annotations

import copy

import torch

from opd.distributions import Head
from opd.drafting.base import Drafter, Outline
from opd.drafting.native import load_drafter, saved_form
from opd.drafting.target import Target
from opd.errors import IncompatibleError

PROPOSER = (
    "Who proposes: `current`, the drafter as it is now; `start`, as it was when the run began; or the folder of "
    "another one of the same target. What is trained is the drafter as it is now in any case"
)
"""Description of the setting."""

OWN = ("current", "start")
"""Proposers that are the trained drafter, now or before."""


def proposer_of(wanted: str, drafter: Drafter, target: Target) -> Drafter:
    """The drafter that a recipe's `rollout.proposer` names.

    Raises:
        ModelError: the folder holds none of this target.
        IncompatibleError: it may propose other ids, or reads other layers, than the one that is trained.
    """
    if wanted == "current":
        return drafter
    if wanted == "start":
        return copy.deepcopy(drafter).requires_grad_(False).eval()
    head = target.language.head(1.0).detach()
    other = load_drafter(wanted, target.outline, head, "rollout.proposer")
    check_proposer(wanted, other, drafter)
    return other.to(target.language.device).float().requires_grad_(False).eval()


def foreseen_proposer(wanted: str, drafter: Drafter, target: Outline, head: Head) -> Drafter:
    """The same for a plan, without weights but those that say which ids it may propose.

    Raises:
        ModelError, IncompatibleError: as `proposer_of`.
    """
    if wanted in OWN:
        return drafter
    with torch.device("meta"):
        other = saved_form(wanted, target, "rollout.proposer").build(target, head)
    check_proposer(wanted, other, drafter)
    return other


def check_proposer(wanted: str, other: Drafter, drafter: Drafter) -> None:
    """Raise `IncompatibleError` where another drafter cannot propose for the one that is trained."""
    if other.ids != drafter.ids:
        raise IncompatibleError(
            f"rollout.proposer {wanted}: it may propose other ids than the drafter that is trained, and target and "
            "drafter are compared over those; take one of the same vocabulary"
        )
    if other.taps != drafter.taps:
        raise IncompatibleError(
            f"rollout.proposer {wanted}: it reads layers {list(other.taps)} of the target and the drafter that is "
            f"trained {list(drafter.taps)}; take one of the same taps"
        )


def blocks_for(wanted: str, proposals: int, drafter: Drafter) -> None:
    """Raise `IncompatibleError` where the drafter that is trained has no place for so many tokens of a block."""
    if drafter.most is not None and proposals > drafter.most:
        raise IncompatibleError(
            f"rollout.proposer {wanted} proposes {proposals} tokens, and the drafter that is trained {drafter.most} at "
            f"most; set rollout.proposals to {drafter.most}"
        )
