"""Evidence: where a quantized network lost accuracy, and what would win it back."""

from quantflow.evidence.budget import Budget
from quantflow.evidence.diagnose import diagnose
from quantflow.evidence.diagnosis import Diagnosis, LayerErrors
from quantflow.evidence.one_at_a_time import LayerCost, Sensitivities, sensitivity

__all__ = [
    "Budget",
    "Diagnosis",
    "LayerCost",
    "LayerErrors",
    "Sensitivities",
    "diagnose",
    "sensitivity",
]
