"""The float network that a prepared graph stands for, as a graph of its own: the teacher of its training."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import node_argument
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.parameters import drop_unused
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize
from quantflow.observers.observation import observer_of
from quantflow.simulation.float_weights import has_teacher, with_float_weights, with_teacher_weights


def float_network(graph: GraphModule) -> TrainableGraphModule:
    """Return the float network of a prepared ``graph``, in inference mode: no observers, weights as before any PTQ algorithm.

    Args:
        graph: A graph prepared for PTQ or QAT; it is left as it was. Of one that has a teacher, the teacher.
    """
    network = with_teacher_weights(graph) if has_teacher(graph) else with_float_weights(graph)
    for node in list(network.graph.nodes):
        if _quantizes(node, network):
            node.replace_all_uses_with(node_argument(node))
            network.graph.erase_node(node)
    drop_unused(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.recompile()
    return network.eval()


def _quantizes(node: Node, network: GraphModule) -> bool:
    if observer_of(node, network) is not None:
        return True
    called = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(called, BatchNormScaledFakeQuantize)
