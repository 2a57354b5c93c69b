"""Evidence: where a quantized network lost accuracy, and what would win it back."""

from quantflow.evidence.diagnose import diagnose
from quantflow.evidence.diagnosis import Diagnosis, LayerErrors

__all__ = ["Diagnosis", "LayerErrors", "diagnose"]
