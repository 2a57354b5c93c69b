"""quantflow: from PyTorch to a quantized ExecuTorch program, proven on the runtime.

One verb an intent: :func:`export`, :func:`prepare`, :func:`calibrate` and :func:`recover`, or :func:`train`,
:func:`convert`, and again :func:`export`; :func:`quantize` for all of it, :func:`load` for a program on disk,
:func:`verify`, :func:`diagnose`, :func:`sensitivity`, :func:`probe` and :func:`inspect` for what came of it, :func:`report` to
show it.

A name is imported when it is first used: torch and torchao take seconds.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantflow.calibrate import calibrate
    from quantflow.convert import convert
    from quantflow.core_aten import CoreAten
    from quantflow.errors import QuantflowError, QuantflowWarning
    from quantflow.evidence.budget import Budget
    from quantflow.evidence.diagnose import diagnose
    from quantflow.evidence.diagnosis import Diagnosis
    from quantflow.evidence.one_at_a_time import Sensitivities, sensitivity
    from quantflow.evidence.probe import probe
    from quantflow.evidence.probing import Probing
    from quantflow.export import export
    from quantflow.exported import Exported
    from quantflow.graph.graph_module import TrainableGraphModule
    from quantflow.grid.fake_quantize import FakeQuantize
    from quantflow.grid.learned_step_size import LearnedStepSize
    from quantflow.inspection.inspect import Inspection, inspect
    from quantflow.prepare import prepare
    from quantflow.program import Program, load
    from quantflow.quantize import Result, quantize
    from quantflow.recovery import Sample
    from quantflow.recovery.recover import Recovered, recover
    from quantflow.report.report import report
    from quantflow.search.found import Found
    from quantflow.search.search import search
    from quantflow.training import Checkpoints, Distillation, History, Schedule, train
    from quantflow.verification.figures import Verification
    from quantflow.verification.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "calibrate": ("calibrate",),
    "convert": ("convert",),
    "core_aten": ("CoreAten",),
    "errors": ("QuantflowError", "QuantflowWarning"),
    "evidence": ("Budget", "Diagnosis", "Probing", "Sensitivities", "diagnose", "probe", "sensitivity"),
    "export": ("export",),
    "exported": ("Exported",),
    "graph.graph_module": ("TrainableGraphModule",),
    "grid.fake_quantize": ("FakeQuantize",),
    "grid.learned_step_size": ("LearnedStepSize",),
    "inspection.inspect": ("Inspection", "inspect"),
    "prepare": ("prepare",),
    "program": ("Program", "load"),
    "quantize": ("Result", "quantize"),
    "recovery": ("Recovered", "Sample", "recover"),
    "report": ("report",),
    "search": ("Found", "search"),
    "training": ("Checkpoints", "Distillation", "History", "Schedule", "train"),
    "verification": ("Verification", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "Checkpoints",
    "CoreAten",
    "Diagnosis",
    "Distillation",
    "Exported",
    "FakeQuantize",
    "Found",
    "History",
    "Inspection",
    "LearnedStepSize",
    "Probing",
    "Program",
    "QuantflowError",
    "QuantflowWarning",
    "Recovered",
    "Result",
    "Sample",
    "Schedule",
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


class _Surface(types.ModuleType):
    """Where a verb and its file share a name, importing the file does not hide the verb."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Surface
