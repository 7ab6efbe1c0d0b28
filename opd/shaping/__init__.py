"""How much each state counts."""

from opd.shaping.base import Shaping

__all__ = ["Shaping"]
