"""On whose states the student learns."""

from opd.rollouts.base import PrefixSource, Rollout

__all__ = ["PrefixSource", "Rollout"]
