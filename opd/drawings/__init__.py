"""Drawing tasks: small pictures made by code, the closed vocabulary that names them, and exact rewards."""

from opd.drawings.base import SPLITS, Drawing, Split, checked

__all__ = ["SPLITS", "Drawing", "Split", "checked"]
