"""All verbs in one: from an eager model to a quantized program."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import nn
from torchao.quantization.pt2e.quantizer import Quantizer

from quantflow import recovery
from quantflow.batches import PickInputs
from quantflow.calibrate import calibrate
from quantflow.convert import convert
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.export import export
from quantflow.graph_module import TrainableGraphModule
from quantflow.prepare import prepare
from quantflow.program import Program
from quantflow.recovery import Recovered, Sample


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        plan: What the quantizer decided, node by node, where it is one that plans; else None.
        recovered: What recovery tried and kept; None where it was not asked for.
        seconds: How long each stage took.
        pte_bytes: Size of the program.
        delegated_fraction: Share of its operators that delegates run.
    """

    plan: Any
    recovered: Recovered | None
    seconds: dict[str, float]
    pte_bytes: int
    delegated_fraction: float

    def __str__(self) -> str:
        timing = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        lines = [f"{self.pte_bytes:,} bytes, {self.delegated_fraction:.1%} of operators delegated", timing]
        return "\n".join([*(str(part) for part in (self.plan, self.recovered) if part is not None), *lines])


@dataclass(frozen=True)
class Result:
    """A quantized program and how it came about.

    Attributes:
        program: The program, for the example's own shapes.
        graph: The converted graph it was lowered from.
        report: What was done.
    """

    program: Program
    graph: TrainableGraphModule = field(repr=False)
    report: Report = field(repr=False)


def quantize(
    model: nn.Module,
    args: Sequence[Any],
    data: Iterable[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    quantizer: Quantizer | None = None,
    delegate: Any = "xnnpack",
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    inputs: PickInputs | None = None,
    recover: bool = True,
    progress: bool = True,
) -> Result:
    """Post-training quantization of ``model``, from export to a program.

    Args:
        model: An eager model.
        args: Example positional inputs; the program is lowered for their shapes.
        data: Calibration batches, of any batch size.
        kwargs: Example keyword inputs.
        quantizer: By default the one registered for ``delegate`` (entry point group ``quantflow.quantizers``).
        delegate: What to lower to, as in ``CoreAten.to_edge``.
        dynamic_batch: Calibrate with any batch size; False for models that can't be captured so.
        dynamic_shapes: Lower for varying shapes, as in ``torch.export``.
        inputs: Picks the inputs out of a calibration batch, where that is ambiguous.
        recover: Win back what quantizing loses (:func:`quantflow.recover`), on a sample of ``data``.
        progress: Show a progress bar.

    Raises:
        QuantflowError: naming the stage that failed.
    """
    quantizer = quantizer or default_quantizer(delegate)
    seconds: dict[str, float] = {}
    with _timed("export", seconds):
        graph = export(model, args, kwargs, dynamic_batch=dynamic_batch).module().eval()
    with _timed("prepare", seconds):
        plan = quantizer.plan(graph) if hasattr(quantizer, "plan") else None
        prepared = prepare(graph, quantizer)
    with _timed("calibrate", seconds):
        sample = Sample()
        calibrate(prepared, data, inputs=inputs, sample=sample if recover else None, progress=progress)
    recovered = None
    if recover:
        with _timed("recover", seconds):
            recovered = recovery.recover(prepared, sample, progress=progress)
        prepared = recovered.graph
    with _timed("convert", seconds):
        converted = convert(prepared)
    with _timed("lower", seconds):
        exported = export(converted, args, kwargs, dynamic_shapes=dynamic_shapes)
        program = exported.to_core_aten().to_edge(delegate).to_executorch()
    fraction = program.delegation.fraction if program.delegation else 0.0
    if delegate is not None and program.delegation and program.delegation.portable:
        outside = ", ".join(program.delegation.portable)
        reason, remedy = (
            f"left to portable kernels: {outside}",
            "print(result.report) says what stays in float, and why",
        )
        warnings.warn(QuantflowWarning("edge", reason, remedy=remedy), stacklevel=2)
    return Result(program, converted, Report(plan, recovered, seconds, len(program.buffer), fraction))


def default_quantizer(delegate: Any) -> Quantizer:
    """A quantizer for the delegate of that name.

    Raises:
        QuantflowError: at stage ``"prepare"``, when none is registered under it.
    """
    registered = {entry.name: entry for entry in entry_points(group="quantflow.quantizers")}
    if not isinstance(delegate, str) or delegate not in registered:
        raise QuantflowError(
            "prepare",
            f"no quantizer is registered for delegate {delegate!r}",
            node="quantizer",
            remedy=f"pass quantizer=...; registered: {sorted(registered)}",
        )
    return registered[delegate].load()()


class _timed:  # noqa: N801  a context manager reads as a verb
    """Note the seconds that a stage takes."""

    def __init__(self, stage: str, seconds: dict[str, float]) -> None:
        self.stage, self.seconds = stage, seconds

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.stage] = round(time.perf_counter() - self.start, 2)
