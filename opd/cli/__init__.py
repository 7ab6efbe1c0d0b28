"""`opd`: the command line."""

from opd.cli.main import main

__all__ = ["main"]
