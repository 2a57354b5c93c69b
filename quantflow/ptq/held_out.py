"""The signal to noise of a prepared graph's outputs on examples that are held out, in simulation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.fx import GraphModule

from quantflow.data.batches import PickInputs
from quantflow.data.sample import Inputs, Sample, cut_inputs
from quantflow.graph.parameters import tensor_of
from quantflow.graph.state import state_reads
from quantflow.metrics import signal_to_noise
from quantflow.ptq.batch_interaction import examples_interact, examples_of
from quantflow.signature.signature import Signature
from quantflow.simulation.float_weights import with_float_weights
from quantflow.simulation.network import outputs
from quantflow.simulation.preconditions import draw
from quantflow.simulation.stateful_calls import holds_state


class HeldOut:
    """Every eighth batch of a sample (of fewer than eight the last, a single one itself), to which nothing is fitted.

    Args:
        graph: The prepared graph, whose float network is the reference.
        drawn: The batches of the sample.

    Attributes:
        fit: The other batches.
        reference: The outputs of the float network for each held-out batch.
    """

    def __init__(self, graph: GraphModule, drawn: Sequence[Inputs]) -> None:
        every = min(8, len(drawn))
        alone = len(drawn) == 1
        self.fit = drawn if alone else [b for i, b in enumerate(drawn) if i % every != every - 1]
        self._batches = drawn if alone else drawn[every - 1 :: every]
        self.reference = outputs(with_float_weights(graph), self._batches, integers=False)
        reads = state_reads(graph.graph) if holds_state(graph, drawn[0]) else []
        self._states = sum(tensor_of(graph, read).is_floating_point() for read in reads)

    def sqnr(self, graph: GraphModule, *, integers: bool = True) -> float:
        """Return the signal to noise of the outputs of the integer network of ``graph`` (or of its float network), dB: the mean
        over outputs or, where it is lower, over the changes of the state.
        """
        found = outputs(graph, self._batches, integers=integers)
        ratios = []
        for theirs, ours in zip(zip(*self.reference, strict=True), zip(*found, strict=True), strict=True):
            flat = (torch.cat([t.flatten() for t in given]) for given in (theirs, ours))
            ratios.append(signal_to_noise(*flat))
        returned = len(ratios) - self._states
        return min(_mean_of_finite(ratios[:returned]), _mean_of_finite(ratios[returned:]))


def _mean_of_finite(ratios: Sequence[float]) -> float:
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    return sum(finite) / len(finite) if finite else math.inf


def why_not_sampled(graph: GraphModule, drawn: Sequence[Inputs]) -> str | None:
    """Return why the sample ``drawn`` says nothing of ``graph``: it was drawn without the state that the graph keeps, or its
    examples act on each other; else None.
    """
    if state_reads(graph.graph) and not holds_state(graph, drawn[0]):
        return "it keeps state, which the sample does not hold"
    cut = cut_inputs(Signature.of_graph(graph))
    most = max(drawn, key=lambda batch: examples_of(batch, cut))
    interact = examples_interact(with_float_weights(graph), most, cut)
    return "the examples of a batch act on each other" if interact else None


def held_out_sqnr(
    graph: GraphModule, data: Sample | Iterable[object], *, stage: str, inputs: PickInputs | None = None
) -> float:
    """Return the signal to noise of the outputs of a prepared ``graph`` on the examples of ``data`` that recovery holds out,
    dB. It is not a number where a sample says nothing of the graph.
    """
    drawn = draw(graph, data, stage=stage, inputs=inputs)
    return math.nan if why_not_sampled(graph, drawn) else HeldOut(graph, drawn).sqnr(graph)
