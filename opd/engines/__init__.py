"""Who draws the student's completions, where the process that trains it does not."""

from opd.engines.base import Pending, RolloutEngine, Writer

__all__ = ["Pending", "RolloutEngine", "Writer"]
