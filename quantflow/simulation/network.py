"""A prepared graph as a network: called on flat inputs, in float or with what its observers quantize quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quantflow.conversion.biases import as_converted
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.graph.state import state_reads
from quantflow.observers.observation import observer_of
from quantflow.simulation.fake_quantized import fake_quantized
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.interpreter import Interpreter, Values, float_tensors


class Simulation:
    """``graph`` in float, or with what its observers quantize quantized; callable on the flat inputs of a batch.

    Observers learn nothing from a call. State is the simulation's own, and goes on from call to call. A call returns all that
    the graph returns, flat, and how each state changes where the batch holds the state before the call.
    """

    @torch.no_grad()
    def __init__(self, graph: GraphModule, *, integers: bool = True) -> None:
        self.interpreter, nodes = Interpreter(graph, quantize=bool(integers)), graph.graph.nodes
        self.known: Values = {}
        self.reset()
        if integers:
            for node in nodes:
                observer = observer_of(node, graph)
                if observer is not None and is_constant(node.args[0]):
                    self.known[node] = fake_quantized(observer, tensor_of(graph, node.args[0]))
            self.known |= as_converted(graph)

    def reset(self) -> None:
        """Let the next call begin in the state that the graph has."""
        graph = self.interpreter.graph
        self.known |= {node: attribute(graph, node) for node in state_reads(graph.graph)}

    @torch.no_grad()
    def __call__(self, *batch: object) -> list[Any]:
        return self.interpreter.outputs(batch, known=self.known)


def outputs(graph: GraphModule, batches: Iterable[tuple], *, integers: bool) -> list[list[torch.Tensor]]:
    """The float tensors that ``graph`` returns for each batch, in float or with what its observers quantize quantized."""
    simulation = Simulation(graph, integers=integers)
    return [float_tensors(simulation(*batch)) for batch in batches]


@torch.no_grad()
def live_bytes(graph: GraphModule, batch: tuple) -> dict[Node, int]:
    """By node, the memory that the values of the float network take when it is computed, in bytes, without parameters."""
    found: dict[Node, int] = {}
    for node, values in Interpreter(graph).run(batch):
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for n, t in values.items()
            if isinstance(t, torch.Tensor) and n.op != "get_attr"
        }
        found[node] = max(1, sum(storages.values()))
    return found
