"""Who looks at rows while they are written, and may end them."""

from opd.watches.base import Findings, LiveWatch, Rows, Watch

__all__ = ["Findings", "LiveWatch", "Rows", "Watch"]
