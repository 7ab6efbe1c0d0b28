"""One student of several: a weighted average of experts of one architecture, to start from."""

from opd.merging.merge import merge

__all__ = ["merge"]
