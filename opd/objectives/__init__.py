"""What a step descends: a divergence from teachers, imitation of given completions, or a verifier's reward."""

from opd.distributions import Target
from opd.objectives.base import Objective
from opd.operator import Loss

__all__ = ["Loss", "Objective", "Target"]
