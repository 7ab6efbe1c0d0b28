"""Trajectories and what teachers said about them, on disk: asked once, trained on as often as one likes."""

from opd.store.store import Store, StoreHeader
from opd.store.targets import Targets, TargetsHeader

__all__ = ["Store", "StoreHeader", "Targets", "TargetsHeader"]
