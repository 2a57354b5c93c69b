"""The command line ``quantflow``. Nothing here imports torch before a command needs it: ``--help`` answers at once."""

from quantflow.cli.main import main

__all__ = ["main"]
