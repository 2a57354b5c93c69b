"""The command line ``quantflow``. Commands import torch only when they run, so that ``--help`` is fast."""

from quantflow.cli.main import main

__all__ = ["main"]
