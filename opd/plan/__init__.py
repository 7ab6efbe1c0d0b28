"""What a recipe will take, from configurations on the meta device. What each model takes, its choice says (`shapes`,
`samplers`); here it is summed, for each modality over what its steps hold."""

from __future__ import annotations

from collections.abc import Callable

from opd.assembly import check_ahead, check_offsets
from opd.choice import kind_of
from opd.errors import OpdError
from opd.plan.acting import ActionPlan, plan_acting
from opd.plan.drafter import DrafterPlan, plan_drafter
from opd.plan.flow import FlowPlan, plan_flow
from opd.plan.language import Plan, plan_language
from opd.policies.draft import Draft
from opd.recipe import Recipe

__all__ = ["ActionPlan", "DrafterPlan", "FlowPlan", "Plan", "make_plan"]

OF_MODALITY: dict[str, Callable[[Recipe], Plan | FlowPlan | ActionPlan]] = {
    "language": plan_language,
    "flow": plan_flow,
    "action": plan_acting,
}


def make_plan(recipe: Recipe) -> Plan | FlowPlan | ActionPlan | DrafterPlan:
    """The plan of `recipe`; no weights are read.

    Raises:
        OpdError: what a run would refuse too, in so far as configurations show it.
    """
    plan = OF_MODALITY.get(recipe.student.modality or "")
    if plan is None:
        raise OpdError(f"opd check has no plan for student.kind {kind_of(recipe.student)!r} yet")
    check_offsets(recipe)
    check_ahead(recipe)
    return plan_drafter(recipe) if isinstance(recipe.student, Draft) else plan(recipe)
