"""What a step descends: a divergence from teachers, imitation of given completions, or a verifier's reward."""

from opd.distributions import Target
from opd.objectives.base import Loss, Objective

__all__ = ["Loss", "Objective", "Target"]
