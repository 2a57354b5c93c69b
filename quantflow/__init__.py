"""quantflow: from PyTorch to a quantized ExecuTorch program, proven on the runtime.

The steps are :func:`export`, :func:`prepare`, :func:`calibrate` and :func:`recover` (PTQ) or :func:`train` (QAT),
:func:`convert`, and :func:`export` again; :func:`quantize` does all of them. :func:`load` reads a program from disk.
:func:`verify`, :func:`diagnose`, :func:`sensitivity`, :func:`probe` and :func:`inspect` examine the results, and
:func:`report` writes them to a page.

Names are imported at first use, because importing torch and torchao takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantflow.analysis.accuracy_control import AccuracyControl
    from quantflow.analysis.diagnose import diagnose
    from quantflow.analysis.diagnosis import Diagnosis
    from quantflow.analysis.probe import probe
    from quantflow.analysis.probe_result import ProbeResult
    from quantflow.analysis.sensitivity import Sensitivities, sensitivity
    from quantflow.calibration.calibrate import calibrate
    from quantflow.capture.export import export
    from quantflow.capture.exported import Exported
    from quantflow.conversion.convert import convert
    from quantflow.data.call_sequence import CallSequence
    from quantflow.data.sample import Sample
    from quantflow.errors import QuantflowError, QuantflowWarning
    from quantflow.evaluation.figures import Verification
    from quantflow.evaluation.verify import verify
    from quantflow.graph.graph_module import TrainableGraphModule
    from quantflow.inspection.inspect import Inspection, inspect
    from quantflow.lowering.core_aten import CoreAten
    from quantflow.lowering.program import Program, load
    from quantflow.mixed_precision.search import search
    from quantflow.mixed_precision.search_result import SearchResult
    from quantflow.observers.fake_quantize import FakeQuantize
    from quantflow.observers.learned_step_size import LearnedStepSize
    from quantflow.pipeline.quantize import quantize
    from quantflow.pipeline.result import Result
    from quantflow.preparation.prepare import prepare
    from quantflow.ptq.recover import RecoveryResult, recover
    from quantflow.reporting.report import report
    from quantflow.training import Accuracy, Checkpoints, Distillation, Fidelity, History, Schedule, train

__version__ = "0.1.0"

_HOMES = {
    "calibration.calibrate": ("calibrate",),
    "conversion.convert": ("convert",),
    "lowering.core_aten": ("CoreAten",),
    "errors": ("QuantflowError", "QuantflowWarning"),
    "analysis": ("AccuracyControl", "Diagnosis", "ProbeResult", "Sensitivities", "diagnose", "probe", "sensitivity"),
    "capture.export": ("export",),
    "capture.exported": ("Exported",),
    "graph.graph_module": ("TrainableGraphModule",),
    "observers.fake_quantize": ("FakeQuantize",),
    "observers.learned_step_size": ("LearnedStepSize",),
    "inspection.inspect": ("Inspection", "inspect"),
    "preparation.prepare": ("prepare",),
    "lowering.program": ("Program", "load"),
    "pipeline.quantize": ("quantize",),
    "pipeline.result": ("Result",),
    "data.call_sequence": ("CallSequence",),
    "data.sample": ("Sample",),
    "ptq": ("RecoveryResult", "recover"),
    "reporting": ("report",),
    "mixed_precision": ("SearchResult", "search"),
    "training": ("Accuracy", "Checkpoints", "Distillation", "Fidelity", "History", "Schedule", "train"),
    "evaluation": ("Verification", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Accuracy",
    "AccuracyControl",
    "CallSequence",
    "Checkpoints",
    "CoreAten",
    "Diagnosis",
    "Distillation",
    "Exported",
    "FakeQuantize",
    "Fidelity",
    "History",
    "Inspection",
    "LearnedStepSize",
    "ProbeResult",
    "Program",
    "QuantflowError",
    "QuantflowWarning",
    "RecoveryResult",
    "Result",
    "Sample",
    "Schedule",
    "SearchResult",
    "Sensitivities",
    "TrainableGraphModule",
    "Verification",
    "calibrate",
    "convert",
    "diagnose",
    "export",
    "inspect",
    "load",
    "prepare",
    "probe",
    "quantize",
    "recover",
    "report",
    "search",
    "sensitivity",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
