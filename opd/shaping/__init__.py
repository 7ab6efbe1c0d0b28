"""How much each state counts."""

from opd.shaping.base import Shape, Shaper, Shaping, joint_shape, looked

__all__ = ["Shape", "Shaper", "Shaping", "joint_shape", "looked"]
