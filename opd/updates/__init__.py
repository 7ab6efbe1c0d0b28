"""How gradients become a step."""

from opd.updates.base import Optimiser, Update

__all__ = ["Optimiser", "Update"]
