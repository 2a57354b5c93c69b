"""A captured model with its data, from which programs are built with different quantizers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torchao.quantization.pt2e.quantizer import Quantizer

from quantflow import ptq
from quantflow.calibration.calibrate import calibrate
from quantflow.capture.export import DynamicShapes, export
from quantflow.conversion.convert import convert
from quantflow.data.batches import PickInputs
from quantflow.delegates import DelegateLike
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.pipeline.result import Report, Result
from quantflow.preparation.prepare import prepare
from quantflow.ptq import RecoveryResult, Sample
from quantflow.ptq.held_out import held_out_sqnr


@dataclass(frozen=True)
class Quantized:
    """A model quantized by one quantizer, before it is lowered.

    Attributes:
        quantizer: The quantizer.
        plan: What it decided, where it plans.
        calibrated: The prepared graph, before recovery.
        graph: The prepared graph, after recovery where it was asked for.
        recovered: What recovery tried; None where it was not tried.
        sample: The examples drawn from the data.
    """

    quantizer: Quantizer
    plan: Any
    calibrated: TrainableGraphModule
    graph: TrainableGraphModule
    recovered: RecoveryResult | None
    sample: Sample

    @cached_property
    def sqnr(self) -> float:
        """Signal to noise of the outputs on held-out examples, dB, simulated; not a number where it can't be measured."""
        if self.recovered is not None:
            return self.recovered.sqnr
        return held_out_sqnr(self.graph, self.sample, stage="quantize")


@dataclass
class Job:
    """The captured model and the data."""

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

    def quantized(self, quantizer: Quantizer) -> Quantized:
        """Prepare, calibrate and recover the captured graph."""
        return self.recovered(self.calibrated(quantizer))

    def calibrated(self, quantizer: Quantizer, graph: TrainableGraphModule | None = None) -> Quantized:
        """Prepare and calibrate the captured graph, or another ``graph`` of the same model."""
        graph = self.graph if graph is None else graph
        with timed("prepare", self.seconds):
            plan = quantizer.plan(graph) if hasattr(quantizer, "plan") else None
            prepared = prepare(graph, quantizer)
        with timed("calibrate", self.seconds):
            sample = Sample()
            calibrate(prepared, self.data, inputs=self.inputs, sample=sample, progress=self.progress)
        return Quantized(quantizer, plan, prepared, prepared, None, sample)

    def recovered(self, quantized: Quantized) -> Quantized:
        """Recover a calibrated graph, if recovery is asked for."""
        if not self.recover or quantized.recovered is not None:
            return quantized
        with timed("recover", self.seconds):
            recovered = ptq.recover(quantized.calibrated, quantized.sample, progress=self.progress)
        return replace(quantized, graph=recovered.graph, recovered=recovered)

    def lowered(self, quantized: Quantized) -> Result:
        """Convert the graph and lower it to a program."""
        from quantflow.lowering.core_aten import straight_to_edge

        with timed("convert", self.seconds):
            converted = convert(quantized.graph)
        with timed("lower", self.seconds):
            exported = export(converted, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes)
            program = straight_to_edge(exported.program, self.delegate).to_executorch()
        fraction = program.delegation.fraction if program.delegation else 0.0
        report = Report(quantized.plan, quantized.recovered, self.seconds, len(program.buffer), fraction)
        return Result(program, converted, report)


class timed:  # noqa: N801  a context manager, named like a function
    """Add the seconds of the block to ``seconds[stage]``."""

    def __init__(self, stage: str, seconds: dict[str, float]) -> None:
        self.stage, self.seconds = stage, seconds

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start, 2)
