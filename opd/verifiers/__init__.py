"""Outcomes: is the completion right?"""

from opd.verifiers.base import Verifier

__all__ = ["Verifier"]
