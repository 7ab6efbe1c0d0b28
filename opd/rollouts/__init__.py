"""On whose states the student learns."""

from opd.rollouts.base import HeldOutSampler, PrefixSource, Rollout
from opd.rollouts.request import Request

__all__ = ["HeldOutSampler", "PrefixSource", "Request", "Rollout"]
