"""How well student and teacher go together at a state, as a rollout drifts away from what the teacher knows."""

from opd.compatibility.base import Compatibility, the_one

__all__ = ["Compatibility", "the_one"]
