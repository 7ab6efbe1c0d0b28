"""Draft models for speculative decoding: what policies, rollouts and teachers of drafters share."""

from opd.drafting.base import Drafter, DrafterSettings

__all__ = ["Drafter", "DrafterSettings"]
