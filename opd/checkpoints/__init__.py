"""Everything that a run needs to go on after it was killed, and the files that hold it."""

from opd.checkpoints.keeper import Checkpoints

__all__ = ["Checkpoints"]
