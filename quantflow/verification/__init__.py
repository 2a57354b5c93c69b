"""Verification: what each stage of a model says beside the first one, and what it costs."""

from quantflow.verification.figures import OutputFigures, StageFigures, Verification
from quantflow.verification.stage import examined
from quantflow.verification.verify import verify

__all__ = ["OutputFigures", "StageFigures", "Verification", "examined", "verify"]
