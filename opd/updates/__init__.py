"""How gradients become a step."""

from opd.updates.base import Optimiser, Planned, Update

__all__ = ["Optimiser", "Planned", "Update"]
