"""The report: what was done to a model, whether it holds and what it won, as one page that needs no network."""

from quantflow.reporting.report import report

__all__ = ["report"]
