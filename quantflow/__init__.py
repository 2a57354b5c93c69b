"""quantflow: from PyTorch to a quantized ExecuTorch program, proven on the runtime.

One verb an intent: :func:`export`, :func:`prepare`, :func:`calibrate` and :func:`recover`, or :func:`train`,
:func:`convert`, and again :func:`export`; :func:`quantize` for all of it, :func:`load` for a program on disk.
"""

from quantflow.calibrate import calibrate
from quantflow.convert import convert
from quantflow.core_aten import CoreAten
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.evidence import Budget, Diagnosis, Sensitivities, diagnose, sensitivity
from quantflow.export import export
from quantflow.exported import Exported
from quantflow.fake_quantize import FakeQuantize
from quantflow.graph_module import TrainableGraphModule
from quantflow.learned_step_size import LearnedStepSize
from quantflow.prepare import prepare
from quantflow.program import Program, load
from quantflow.quantize import Result, quantize
from quantflow.recovery import Recovered, Sample, recover
from quantflow.training import Checkpoints, Distillation, History, Schedule, train

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Checkpoints",
    "CoreAten",
    "Diagnosis",
    "Distillation",
    "Exported",
    "FakeQuantize",
    "History",
    "LearnedStepSize",
    "Program",
    "QuantflowError",
    "QuantflowWarning",
    "Recovered",
    "Result",
    "Sample",
    "Schedule",
    "Sensitivities",
    "TrainableGraphModule",
    "calibrate",
    "convert",
    "diagnose",
    "export",
    "load",
    "prepare",
    "quantize",
    "recover",
    "sensitivity",
    "train",
]
