"""How much each state counts."""

from opd.shaping.base import Shaper, Shaping

__all__ = ["Shaper", "Shaping"]
