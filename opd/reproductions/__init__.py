"""Experiments that decide claims: every arm, the controls too, over seeds, and verdicts computed from intervals."""

from opd.reproductions.definition import Claim, Gate, Reproduction, Smoke, Stage
from opd.reproductions.training import train

__all__ = ["Claim", "Gate", "Reproduction", "Smoke", "Stage", "train"]
