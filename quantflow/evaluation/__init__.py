"""Evaluation: accuracy, agreement, SQNR, size and latency of each stage of a model, compared with the first stage."""

from quantflow.evaluation.figures import OutputFigures, StageFigures, Verification
from quantflow.evaluation.runnable import examined
from quantflow.evaluation.verify import verify

__all__ = ["OutputFigures", "StageFigures", "Verification", "examined", "verify"]
