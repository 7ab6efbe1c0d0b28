"""Which drafter proposes while one is trained: the same, as it was at the start, or another."""

from __future__ import annotations

import copy

from opd.drafting.base import Drafter
from opd.drafting.native import load_drafter
from opd.drafting.target import Target
from opd.errors import IncompatibleError

PROPOSER = (
    "Who proposes: `current`, the drafter as it is now; `start`, as it was when the run began; or the folder of "
    "another one of the same target. What is trained is the drafter as it is now in any case"
)
"""Description of the setting."""


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
    return other.to(target.language.device).float().requires_grad_(False).eval()
