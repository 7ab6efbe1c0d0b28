"""Scoring by a server: the client, what servers are asked and how their answers are read and checked."""

from opd.remote.client import Client, RequestError

__all__ = ["Client", "RequestError"]
