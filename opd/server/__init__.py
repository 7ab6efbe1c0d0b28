"""`opd serve`: a model behind the protocol that served teachers are asked by."""

from opd.server.reading import Limits
from opd.server.serving import ServedModel, serve

__all__ = ["Limits", "ServedModel", "serve"]
