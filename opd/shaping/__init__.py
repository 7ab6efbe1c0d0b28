"""How much each state counts."""

from opd.shaping.base import Shape, Shaper, Shaping, joint_shape, looked, words_of

__all__ = ["Shape", "Shaper", "Shaping", "joint_shape", "looked", "words_of"]
