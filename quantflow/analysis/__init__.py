"""Analysis: which layers of a quantized network lose accuracy, and which to leave in float."""

from quantflow.analysis.accuracy_control import AccuracyControl
from quantflow.analysis.diagnose import diagnose
from quantflow.analysis.diagnosis import Diagnosis, LayerErrors
from quantflow.analysis.probe import probe
from quantflow.analysis.probe_result import Probed, ProbeResult
from quantflow.analysis.sensitivity import LayerCost, Sensitivities, sensitivity
from quantflow.analysis.sqnr_control import SqnrControl

__all__ = [
    "AccuracyControl",
    "Diagnosis",
    "LayerCost",
    "LayerErrors",
    "ProbeResult",
    "Probed",
    "Sensitivities",
    "SqnrControl",
    "diagnose",
    "probe",
    "sensitivity",
]
