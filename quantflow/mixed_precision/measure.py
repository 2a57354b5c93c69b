"""Measurements for the search: noise in simulation, size and latency as differences between real programs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from quantflow import latency
from quantflow.analysis.layers import Within, layer_name, layers_of
from quantflow.analysis.sensitivity import OutputNoise
from quantflow.calibration.calibrate import calibrate
from quantflow.capture.export import export
from quantflow.conversion.convert import convert
from quantflow.data.batches import PickInputs, batches
from quantflow.data.sample import Sample
from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError
from quantflow.lowering.program import Program
from quantflow.mixed_precision.choices import Choice, Table
from quantflow.preparation.prepare import prepare
from quantflow.signature.signature import Signature
from quantflow.simulation.partial import PartialNetwork
from quantflow.simulation.preconditions import draw
from quantflow.simulation.stateful_calls import stateful_calls

_BATCHES = 4  # batches of at most 8 examples to measure noise on
_FEW = 16  # examples to calibrate programs whose accuracy does not matter


@dataclass(frozen=True)
class Subject:
    """The input of the search: the captured graph, example inputs, data and the quantizer."""

    graph: GraphModule
    args: Sequence[object]
    kwargs: Mapping[str, object] | None
    data: Iterable[object]
    quantizer: Any
    delegate: DelegateLike
    inputs: PickInputs | None

    def calibrated(self, quantizer: Any) -> tuple[GraphModule, Sample]:
        """The graph prepared by ``quantizer`` and calibrated, and a sample of the data."""
        sample = Sample()
        prepared = prepare(self.graph, quantizer)
        return calibrate(prepared, self.data, inputs=self.inputs, sample=sample, progress=False), sample

    @cached_property
    def few(self) -> Sample:
        """A sample of examples of the first batch."""
        sample, signature = Sample(_FEW), Signature.of_graph(self.graph)
        feed = itertools.islice(batches(self.data, self.graph, stage="search", inputs=self.inputs), 1)
        for flat in stateful_calls(self.graph, feed, signature, stage="search"):
            sample.add(flat, signature)
        return sample

    def program(self, quantizer: Any) -> Program:
        """A program with the size and speed that ``quantizer`` gives, calibrated on a few examples.

        It is in float if ``quantizer`` quantizes nothing.
        """
        from quantflow.lowering.core_aten import straight_to_edge

        converted = self.graph
        if quantizer.plan(self.graph).integer:
            prepared = prepare(self.graph, quantizer)
            signature = Signature.of_graph(prepared)
            with torch.no_grad():
                for flat in draw(prepared, self.few, stage="search"):
                    args, kwargs = signature.call(flat[: len(signature.inputs)])
                    prepared(*args, **kwargs)
            converted = convert(prepared)
        return straight_to_edge(export(converted, self.args, self.kwargs).program, self.delegate).to_executorch()

    def milliseconds(self, program: Program) -> float:
        """The median latency on the example inputs."""
        threads = torch.get_num_threads()
        return latency.measure(lambda: program(*self.args, **(self.kwargs or {})), rows=1, threads=threads).median_ms


def measured(subject: Subject, precisions: Mapping[str, object], *, timed: bool, progress: bool) -> Table:
    """The table for every layer with a quantized weight.

    Args:
        subject: The input of the search.
        precisions: Schemes by name, None for float. A layer gets those that its backend supports.
        timed: Whether to measure latency; otherwise it is 0.
        progress: Show a progress bar.
    """
    own = _weighted(subject)
    layers = list(own)
    refused = {name: _refused(subject, scheme, layers) for name, scheme in precisions.items()}
    possible = {name: [layer for layer in layers if layer not in why] for name, why in refused.items()}
    for layer in layers:
        if all(layer in why for why in refused.values()):
            reason = "; ".join(f"no {name}, {why[layer]}" for name, why in refused.items())
            remedy = '"float": None as one more precision, or skip=[...] the layer in the quantizer'
            raise QuantflowError("search", f"it can have none of the precisions: {reason}", node=layer, remedy=remedy)
    noises = {name: _noises(subject, scheme, possible[name]) for name, scheme in precisions.items()}
    base = subject.program(subject.quantizer)
    base_time = subject.milliseconds(base) if timed else 0.0
    choices = []
    pairs = [(layer, name) for layer in layers for name in precisions if layer in possible[name]]
    for layer, name in tqdm(pairs, desc="search", unit="program", disable=not progress, leave=False):
        if own[layer] == precisions[name]:  # this is the baseline program
            choices.append(Choice(layer, name, noises[name][layer], 0, 0.0))
            continue
        program = subject.program(subject.quantizer.overriding([(Within(layer), precisions[name])]))
        time = subject.milliseconds(program) - base_time if timed else 0.0
        choices.append(Choice(layer, name, noises[name][layer], len(program.buffer) - len(base.buffer), time))
    return Table(tuple(choices), len(base.buffer), base_time)


def _weighted(subject: Subject) -> dict[str, object]:
    """The layers with a quantized weight, in graph order, with their schemes."""
    integer = subject.quantizer.plan(subject.graph).integer
    found = {layer_name(d.node): d.scheme for d in integer if d.rule is not None and d.rule.weight is not None}
    if not found:
        remedy = "print(quantizer.plan(graph)) tells why"
        raise QuantflowError("search", "no layer with weights is quantized", node="quantizer", remedy=remedy)
    return found


def _refused(subject: Subject, scheme: object, layers: Sequence[str]) -> dict[str, str]:
    """The reasons of those ``layers`` that can't have ``scheme``."""
    if scheme is None:
        return {}
    plan = subject.quantizer.overriding([(Within(layer), scheme) for layer in layers]).plan(subject.graph)
    weighted = [d for d in plan.decisions if d.rule is not None and d.rule.weight is not None]
    return {layer_name(d.node): d.reason for d in weighted if d.scheme != scheme}


def _noises(subject: Subject, scheme: object, layers: Sequence[str]) -> dict[str, float]:
    """The noise power at the outputs, relative to their power, with one layer at a time in ``scheme``."""
    if scheme is None or not layers:
        return dict.fromkeys(layers, 0.0)
    quantizer = subject.quantizer.overriding([(Within(layer), scheme) for layer in layers])
    prepared, sample = subject.calibrated(quantizer)
    observers = {layer.name: layer.observers for layer in layers_of(prepared)}
    noises = {layer: OutputNoise() for layer in layers}
    for batch in draw(prepared, sample, stage="search")[:_BATCHES]:
        base = PartialNetwork(prepared, batch, ())
        for layer, noise in noises.items():
            noise.add(base.returned, base.outputs(observers[layer]))
    return {layer: noise.mean for layer, noise in noises.items()}
