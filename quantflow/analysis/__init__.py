"""Evidence: where a quantized network lost accuracy, and what would win it back."""

from quantflow.analysis.accuracy_control import Budget
from quantflow.analysis.diagnose import diagnose
from quantflow.analysis.diagnosis import Diagnosis, LayerErrors
from quantflow.analysis.probe import probe
from quantflow.analysis.probe_result import Probed, Probing
from quantflow.analysis.sensitivity import LayerCost, Sensitivities, sensitivity

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
