"""The loss operator: head projection, comparison and gradient, chunk by chunk over the positions that count.

It knows distributions and targets. What is compared, and how, a divergence or an objective brings along (`Comparison`).
"""

from opd.operator.actions import ActionRule, action_loss, along_actions
from opd.operator.chunks import Chunk, Compared, Comparison, Whole, chunk_rows, memory_bound
from opd.operator.gradient import divergence_loss
from opd.operator.loss import Loss

__all__ = [
    "ActionRule",
    "Chunk",
    "Compared",
    "Comparison",
    "Loss",
    "Whole",
    "action_loss",
    "along_actions",
    "chunk_rows",
    "divergence_loss",
    "memory_bound",
]
