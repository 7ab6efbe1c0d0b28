"""Differential privacy: what steps cost, and what a run has spent."""

from opd.privacy.accounting import Accountant, Part, epsilon_of, noise_for, steps_within
from opd.privacy.spending import Spending

__all__ = ["Accountant", "Part", "Spending", "epsilon_of", "noise_for", "steps_within"]
