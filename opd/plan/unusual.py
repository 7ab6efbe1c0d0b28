"""What of a recipe is seldom meant: it is allowed, and said."""

from __future__ import annotations

from opd.choice import nested
from opd.plan import ActionPlan, DrafterPlan, FlowPlan, Plan
from opd.plan.at_hand import prompts_at_hand
from opd.recipe import Recipe
from opd.rollouts.student import StudentRollout
from opd.schedules import extremes

LARGE = 5e8
"""Parameters from which a model counts as a large one."""
RATES = {"large": 1e-4, "small": 1e-3, "adapters": 2e-3}
"""Highest usual learning rates of Adam: of large and of small models whole, and of adapters."""
LEAST_OF_ADAPTERS = 2e-5
EPOCHS = 20
"""How often a prompt comes at most."""


def unusual(recipe: Recipe, plan: Plan | FlowPlan | ActionPlan | DrafterPlan) -> tuple[str, ...]:
    """Lines that name a key, its value, what is usual and what to do."""
    return tuple(line for line in (_rate(recipe, plan), _greedy(recipe), _epochs(recipe)) if line)


def _rate(recipe: Recipe, plan: Plan | FlowPlan | ActionPlan | DrafterPlan) -> str | None:
    given = getattr(recipe.update, "learning_rate", None)
    if given is None or not isinstance(plan, Plan):
        return None
    # A schedule may end at nothing; its height counts.
    most = float(extremes(given)[1])
    adapted = getattr(recipe.student, "lora", None) is not None
    kind = "adapters" if adapted else "large" if plan.student.parameters >= LARGE else "small"
    who = "adapters" if adapted else f"a model of {plan.student.parameters / 1e6:.0f} M parameters"
    if most > RATES[kind]:
        return f"update.learning_rate reaches {most:g}, where {who} seldom bear more than {RATES[kind]:g}; try a tenth"
    if adapted and most < LEAST_OF_ADAPTERS:
        return (
            f"update.learning_rate is at most {most:g}, where adapters usually take 1e-4 or more; what fits a whole "
            "model is too low for them"
        )
    return None


def _greedy(recipe: Recipe) -> str | None:
    for part in nested(recipe.rollout):
        if isinstance(part, StudentRollout) and extremes(part.top_k) == (1, 1):
            return "rollout.top_k is 1: the student visits one trajectory a prompt, always the same; 0 draws freely"
    return None


def _epochs(recipe: Recipe) -> str | None:
    found = prompts_at_hand(recipe, [])
    if found is None or not found[0]:
        return None
    times = recipe.steps * recipe.batch.prompts / len(found[0])
    if times <= EPOCHS:
        return None
    return (
        f"{len(found[0])} training prompts come {times:.0f} times each in {recipe.steps} steps of batch.prompts="
        f"{recipe.batch.prompts}; take more prompts, or fewer steps"
    )
