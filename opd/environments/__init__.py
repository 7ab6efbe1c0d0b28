"""Where an agent acts: simulators of robots, and whatever else answers what is done to it."""

from opd.environments.base import Environment, Start, Turn, World

__all__ = ["Environment", "Start", "Turn", "World"]
