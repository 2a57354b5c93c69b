"""Evidence: where a quantized network lost accuracy, and what would win it back."""

from quantflow.evidence.budget import Budget
from quantflow.evidence.diagnose import diagnose
from quantflow.evidence.diagnosis import Diagnosis, LayerErrors
from quantflow.evidence.one_at_a_time import LayerCost, Sensitivities, sensitivity
from quantflow.evidence.probe import probe
from quantflow.evidence.probing import Probed, Probing

__all__ = [
    "Budget",
    "Diagnosis",
    "LayerCost",
    "LayerErrors",
    "Probed",
    "Probing",
    "Sensitivities",
    "diagnose",
    "probe",
    "sensitivity",
]
