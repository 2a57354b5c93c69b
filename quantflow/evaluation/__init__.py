"""Verification: what each stage of a model says beside the first one, and what it costs."""

from quantflow.evaluation.figures import OutputFigures, StageFigures, Verification
from quantflow.evaluation.runnable import examined
from quantflow.evaluation.verify import verify

__all__ = ["OutputFigures", "StageFigures", "Verification", "examined", "verify"]
