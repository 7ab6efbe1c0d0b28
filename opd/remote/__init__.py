"""Scoring by a server: the client, what servers are asked and how their answers are read and checked."""

from opd.remote.client import Client, RequestFailed

__all__ = ["Client", "RequestFailed"]
