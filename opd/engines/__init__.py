"""Who draws the student's completions, where the rollout does not do it itself."""

from opd.engines.base import Pending, RolloutEngine, Writer

__all__ = ["Pending", "RolloutEngine", "Writer"]
