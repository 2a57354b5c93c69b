"""``quantize``: from an eager model to a quantized program in one call."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e.quantizer import Quantizer

from quantflow import ptq
from quantflow.analysis import AccuracyControl, sensitivity
from quantflow.analysis.accuracy_control import keep_within
from quantflow.analysis.evaluator import Evaluator
from quantflow.analysis.layers import Within
from quantflow.calibration.calibrate import calibrate
from quantflow.capture.export import DynamicShapes, export
from quantflow.conversion.convert import convert
from quantflow.data.batches import PickInputs
from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.lowering.program import Program
from quantflow.preparation.prepare import prepare
from quantflow.ptq import RecoveryResult, Sample


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        plan: What the quantizer decided, node by node, where it is one that plans; else None.
        recovered: What recovery tried and kept; None where it was not asked for.
        seconds: How long each stage took, in all.
        pte_bytes: Size of the program.
        delegated_fraction: Share of its operators that delegates run.
        accuracy_control: How the accuracy budget was met; None where none was given.
    """

    plan: Any
    recovered: RecoveryResult | None
    seconds: dict[str, float]
    pte_bytes: int
    delegated_fraction: float
    accuracy_control: AccuracyControl | None = None

    def to_json(self) -> str:
        """All of it, as a JSON object; what there is not, or can't be told in JSON, as null."""
        parts = {"plan": self.plan, "recovered": self.recovered, "accuracy-control": self.accuracy_control}
        told = {name: json.loads(part.to_json()) if hasattr(part, "to_json") else None for name, part in parts.items()}
        sizes = {"pte_bytes": self.pte_bytes, "delegated_fraction": self.delegated_fraction}
        return json.dumps({**sizes, "seconds": self.seconds, **told}, indent=2)

    def __str__(self) -> str:
        timing = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        lines = [f"{self.pte_bytes:,} bytes, {self.delegated_fraction:.1%} of operators delegated", timing]
        return "\n".join(
            [*(str(part) for part in (self.plan, self.recovered, self.accuracy_control) if part is not None), *lines]
        )


@dataclass(frozen=True)
class Result:
    """A quantized program, the graph it was lowered from, and a report of what was done.

    Attributes:
        program: The program, for the shapes of the example inputs.
        graph: The converted graph that the program was lowered from.
        report: The plan, the recovery, the seconds of each stage, the bytes of the program and the delegated fraction.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> result = qf.quantize(model, (x,), [torch.randn(4, 3, 8, 8)], recover=False, progress=False)
        >>> result.report.delegated_fraction
        1.0
    """

    program: Program
    graph: TrainableGraphModule = field(repr=False)
    report: Report = field(repr=False)


def quantize(
    model: nn.Module | ExportedProgram,
    args: Sequence[object],
    data: Iterable[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    quantizer: Quantizer | None = None,
    delegate: DelegateLike = "xnnpack",
    dynamic_batch: bool = True,
    dynamic_shapes: DynamicShapes = None,
    inputs: PickInputs | None = None,
    recover: Literal["auto"] | bool = "auto",
    max_drop: float | None = None,
    validation: Iterable[object] | None = None,
    progress: bool = True,
) -> Result:
    """Quantize ``model`` after training (PTQ) and lower it to a program.

    The stages are export, prepare, calibrate, recover, convert and lower. A warning names the operators that the delegate
    leaves to portable kernels.

    Args:
        model: An eager model.
        args: Example positional inputs, a tuple; the program is lowered for their shapes.
        data: Calibration batches, of any batch size, as for :func:`quantflow.calibrate`. With ``max_drop`` they are gone
            through more than once.
        kwargs: Example keyword inputs.
        quantizer: A torchao pt2e ``Quantizer``; by default the one registered for ``delegate`` (entry point group
            ``quantflow.quantizers``).
        delegate: The delegate to lower to, as in ``CoreAten.to_edge``.
        dynamic_batch: Calibrate with any batch size; False for models that can't be captured so.
        dynamic_shapes: Calibrate with and lower for varying shapes, as in ``torch.export``.
        inputs: Picks the inputs out of a calibration batch, where that is ambiguous.
        recover: ``"auto"`` or True runs :func:`quantflow.recover` on a sample of ``data`` and keeps what helps on examples
            held out; the report lists the steps. False leaves it out.
        max_drop: The share of examples that a classifier may lose, 0 to 1, measured on the runtime. The fewest layers found
            with which the program keeps it are left in float, and the report names them. Where none is found, the best
            program comes with a warning. None for no limit.
        validation: Batches to measure the drop on; by default ``data``. With ``(inputs, target)`` the drop is that of
            accuracy; without targets it is the share of examples that get another class than in float.
        progress: Show progress bars.

    Returns:
        The program, its graph and the report.

    Raises:
        QuantflowError: naming the stage that failed; at stage ``"accuracy-control"``, when ``max_drop`` is no share, the
            quantizer has no overrides by layer, or the data can be gone through once only.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
        >>> data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
        >>> result = qf.quantize(model.eval(), (x,), data, progress=False)
        >>> tuple(result.program(x).shape), result.report.delegated_fraction
        ((1, 4), 1.0)
    """
    if recover not in ("auto", True, False):
        raise QuantflowError("recover", f"{recover!r} is no way to recover", node="recover", remedy='"auto" or False')
    if not isinstance(dynamic_batch, bool):
        reason = f"{dynamic_batch!r} is not a bool: it is for calibration, and the program takes the example's batch"
        remedy = "dynamic_shapes=..., or the stages one by one with qf.export(converted, (x,), dynamic_batch=N)"
        raise QuantflowError("export", reason, node="dynamic_batch", remedy=remedy)
    quantizer = quantizer or default_quantizer(delegate)
    seconds: dict[str, float] = {}
    with _timed("export", seconds):
        exported = export(model, args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
        graph = exported.module().eval()
    job = _Job(graph, args, data, kwargs, delegate, dynamic_shapes, inputs, bool(recover), progress, seconds)
    if max_drop is None:
        result = job.build(quantizer)
    else:
        result = _within_max_drop(job, quantizer, max_drop, data if validation is None else validation)
    delegation = result.program.delegation
    if delegate is not None and delegation and delegation.portable:
        outside = ", ".join(delegation.portable)
        reason, remedy = (
            f"left to portable kernels: {outside}",
            "print(result.report) says what stays in float, and why",
        )
        warnings.warn(QuantflowWarning("edge", reason, remedy=remedy), stacklevel=2)
    return result


@dataclass
class _Job:
    """The captured model and the data, from which programs are built with different quantizers."""

    graph: TrainableGraphModule
    args: Sequence[object]
    data: Iterable[object]
    kwargs: Mapping[str, object] | None
    delegate: DelegateLike
    dynamic_shapes: DynamicShapes
    inputs: PickInputs | None
    recover: bool
    progress: bool
    seconds: dict[str, float]
    calibrated: TrainableGraphModule | None = None  # the graph of the last build, before recovery
    sample: Sample = field(default_factory=Sample)

    def build(self, quantizer: Quantizer) -> Result:
        """Quantize the captured graph and lower it to a program."""
        from quantflow.lowering.core_aten import straight_to_edge

        with _timed("prepare", self.seconds):
            plan = quantizer.plan(self.graph) if hasattr(quantizer, "plan") else None
            prepared = prepare(self.graph, quantizer)
        with _timed("calibrate", self.seconds):
            self.sample = Sample()
            calibrate(prepared, self.data, inputs=self.inputs, sample=self.sample, progress=self.progress)
            self.calibrated = prepared
        recovered = None
        if self.recover:
            with _timed("recover", self.seconds):
                recovered = ptq.recover(prepared, self.sample, progress=self.progress)
            prepared = recovered.graph
        with _timed("convert", self.seconds):
            converted = convert(prepared)
        with _timed("lower", self.seconds):
            exported = export(converted, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes)
            program = straight_to_edge(exported.program, self.delegate).to_executorch()
        fraction = program.delegation.fraction if program.delegation else 0.0
        return Result(program, converted, Report(plan, recovered, self.seconds, len(program.buffer), fraction))


def _within_max_drop(job: _Job, quantizer: Any, max_drop: float, validation: Iterable[object]) -> Result:
    if not hasattr(quantizer, "overriding"):
        remedy = "pass one with overrides by layer, as XNNPACKQuantizer()"
        reason = f"{type(quantizer).__name__} can't leave single layers in float"
        raise QuantflowError("accuracy-control", reason, node="quantizer", remedy=remedy)
    if not 0 <= max_drop <= 1:
        raise QuantflowError(
            "accuracy-control", f"{max_drop} is no share", node="max_drop", remedy="0.005 for half a point"
        )
    if iter(job.data) is job.data:
        reason, remedy = "the data can be gone through once only", "pass a list of batches or a DataLoader"
        raise QuantflowError("accuracy-control", reason, node="data", remedy=remedy)
    evaluator = Evaluator(job.graph, validation, job.inputs)
    first = job.build(quantizer)
    calibrated, sample = job.calibrated, job.sample
    assert calibrated is not None
    kept = keep_within(
        max_drop,
        evaluator,
        first,
        lambda names: job.build(quantizer.overriding([(Within(name), None) for name in names])),
        calibrated,
        lambda: sensitivity(calibrated, sample, progress=job.progress),
    )
    return replace(kept.built, report=replace(kept.built.report, accuracy_control=kept.accuracy_control))


def default_quantizer(delegate: DelegateLike, **settings: Any) -> Quantizer:
    """The quantizer registered for ``delegate``, constructed with ``settings``.

    Raises:
        QuantflowError: at stage ``"prepare"``, if no quantizer is registered for ``delegate``.
    """
    registered = {entry.name: entry for entry in entry_points(group="quantflow.quantizers")}
    if not isinstance(delegate, str) or delegate not in registered:
        raise QuantflowError(
            "prepare",
            f"no quantizer is registered for delegate {delegate!r}",
            node="quantizer",
            remedy=f"pass quantizer=...; registered: {sorted(registered)}",
        )
    return registered[delegate].load()(**settings)


class _timed:  # noqa: N801  a context manager, named like a function
    """Add the seconds of the block to ``seconds[stage]``."""

    def __init__(self, stage: str, seconds: dict[str, float]) -> None:
        self.stage, self.seconds = stage, seconds

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start, 2)
