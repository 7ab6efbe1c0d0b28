"""Outcomes: is the completion right?"""

from opd.verifiers.base import CompletionVerifier, OneByOne, Scorer, Verifier

__all__ = ["CompletionVerifier", "OneByOne", "Scorer", "Verifier"]
