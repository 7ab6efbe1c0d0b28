"""Scenes: a student and a teacher so small that an expectation over what the student draws is a finite sum.

A divergence names the kind of scene that the table of objectives measures it in (`Divergence.scene`).
"""

from opd.scenes.base import Scene
from opd.scenes.latents import LatentScene
from opd.scenes.sequences import SequenceScene
from opd.scenes.tokenised import TokenisedScene

__all__ = ["LatentScene", "Scene", "SequenceScene", "TokenisedScene"]
