"""How much each state counts."""

from opd.shaping.base import Shape, Shaper, Shaping

__all__ = ["Shape", "Shaper", "Shaping"]
