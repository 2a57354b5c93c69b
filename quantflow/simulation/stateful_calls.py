"""Calls of a network that keeps state, as independent examples: flat inputs, and the state before the call behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from quantflow.data.batches import Batch
from quantflow.data.sample import Inputs
from quantflow.graph.state import state_reads
from quantflow.signature.signature import Signature
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.network import Simulation


def state_of(graph: GraphModule, reads: Iterable[Node]) -> tuple[torch.Tensor, ...]:
    """A copy of the state that ``reads``, the :func:`state_reads` of ``graph``, read now."""
    return tuple(attribute(graph, read) for read in reads)


def holds_state(graph: GraphModule, flat: Inputs) -> bool:
    """Whether the state is behind the inputs of ``graph`` in ``flat``."""
    return len(flat) > len(graph.graph.find_nodes(op="placeholder"))


def stateful_calls(
    graph: GraphModule, batches: Iterable[Batch], signature: Signature, *, stage: str
) -> Iterator[Inputs]:
    """The flat inputs of each of ``batches``, with the state of the float network before the call if ``graph`` keeps any."""
    reads = state_reads(graph.graph)
    network = Simulation(graph, integers=False) if reads else None
    for batch in batches:
        flat = tuple(signature.flatten(batch.args, batch.kwargs, stage=stage))
        if network is None:
            yield flat
            continue
        if batch.begins:
            network.reset()
        yield (*flat, *(network.known[read].clone() for read in reads))
        network(*flat)
