"""A sandbox for Python programs that a model wrote."""

from opd.sandbox.base import Confinement, Ended, Limits, Ran
from opd.sandbox.detection import sandbox, why_not
from opd.sandbox.running import Sandbox

__all__ = ["Confinement", "Ended", "Limits", "Ran", "Sandbox", "sandbox", "why_not"]
