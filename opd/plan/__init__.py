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

OF_MODALITY: dict[str, Callable[[Recipe], FlowPlan | ActionPlan]] = {
    "flow": plan_flow,
    "action": plan_acting,
}


def make_plan(recipe: Recipe, home: str | None = None) -> Plan | FlowPlan | ActionPlan | DrafterPlan:
    """The plan of `recipe`; no weights are read. Of a language model or a drafter `home` is the kind of device that it
    is made for, `cpu` or `cuda`; by default that of the recipe, on this machine.

    Raises:
        OpdError: what a run would refuse too, in so far as configurations show it.
    """
    modality = recipe.student.modality or ""
    if modality != "language" and modality not in OF_MODALITY:
        raise OpdError(f"opd check has no plan for student.kind {kind_of(recipe.student)!r} yet")
    check_offsets(recipe)
    check_ahead(recipe)
    if modality != "language":
        return OF_MODALITY[modality](recipe)
    return plan_drafter(recipe, home) if isinstance(recipe.student, Draft) else plan_language(recipe, home)
