"""``quantize``: from an eager model to a quantized program in one call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e.quantizer import Quantizer

from quantflow.analysis import sensitivity
from quantflow.analysis.accuracy_control import keep_within
from quantflow.analysis.evaluator import Evaluator
from quantflow.analysis.layers import Within
from quantflow.capture.export import DynamicShapes, export
from quantflow.data.batches import PickInputs
from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.pipeline.default_quantizer import default_quantizer
from quantflow.pipeline.job import Job, timed
from quantflow.pipeline.precision_fallback import hold_sqnr
from quantflow.pipeline.result import Result


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
    min_sqnr: float | Literal["auto"] | None = "auto",
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
        min_sqnr: The least signal to noise of the outputs, dB, on held-out examples of ``data`` in simulation. Below it, where
            the quantizer has overrides by layer, :func:`quantflow.ptq.smooth` is tried, then dynamic activations for the linear
            layers to blame, then float for single layers. The first that holds is kept, and the report tells it; where none
            does, the best comes with a warning that names layers. ``"auto"`` is 20 dB for weights of 8 bits and none for fewer;
            None for none. With ``max_drop`` it has no effect. Each attempt goes through ``data`` again.
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
    if min_sqnr not in ("auto", None) and (not isinstance(min_sqnr, (int, float)) or math.isnan(min_sqnr)):
        reason, remedy = f"{min_sqnr!r} is no signal to noise", 'a number of dB, "auto" or None'
        raise QuantflowError("quantize", reason, node="min_sqnr", remedy=remedy)
    if not isinstance(dynamic_batch, bool):
        reason = f"{dynamic_batch!r} is not a bool: it is for calibration, and the program takes the example's batch"
        remedy = "dynamic_shapes=..., or the stages one by one with qf.export(converted, (x,), dynamic_batch=N)"
        raise QuantflowError("export", reason, node="dynamic_batch", remedy=remedy)
    quantizer = quantizer or default_quantizer(delegate)
    seconds: dict[str, float] = {}
    with timed("export", seconds):
        exported = export(model, args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
        graph = exported.module().eval()
    job = Job(graph, args, data, kwargs, delegate, dynamic_shapes, inputs, bool(recover), progress, seconds)
    if max_drop is not None:
        result = _within_max_drop(job, quantizer, max_drop, data if validation is None else validation)
    else:
        quantized, control = hold_sqnr(job, quantizer, min_sqnr)
        result = job.lowered(quantized)
        result = replace(result, report=replace(result.report, sqnr_control=control))
    delegation = result.program.delegation
    if delegate is not None and delegation and delegation.portable:
        outside = ", ".join(delegation.portable)
        reason, remedy = (
            f"left to portable kernels: {outside}",
            "print(result.report) says what stays in float, and why",
        )
        warnings.warn(QuantflowWarning("edge", reason, remedy=remedy), stacklevel=2)
    return result


def _within_max_drop(job: Job, quantizer: Any, max_drop: float, validation: Iterable[object]) -> Result:
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
    first = job.quantized(quantizer)

    def build(names: Sequence[str]) -> Result:
        return job.lowered(job.quantized(quantizer.overriding([(Within(name), None) for name in names])))

    kept = keep_within(
        max_drop,
        evaluator,
        job.lowered(first),
        build,
        first.calibrated,
        lambda: sensitivity(first.calibrated, first.sample, progress=job.progress),
    )
    return replace(kept.built, report=replace(kept.built.report, accuracy_control=kept.accuracy_control))
