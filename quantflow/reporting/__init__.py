"""The report: quantization, accuracy, size and latency of a model, as one self-contained HTML page."""

from quantflow.reporting.report import report

__all__ = ["report"]
