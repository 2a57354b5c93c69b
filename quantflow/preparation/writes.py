"""Checks against quantizing tensors that are written in place: the write would change a copy, or not reach the copy."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from quantflow.errors import QuantflowError
from quantflow.graph.aten import label, node_argument
from quantflow.graph.state import aliased_by, written_by, written_tensors
from quantflow.observers.observation import observer_of
from quantflow.preparation.sharing import annotation_of


def check_annotated_writes(graph: Graph) -> None:
    """Raise for annotations on tensors that are written in place and read elsewhere; stock quantizers do not check for this.

    Raises:
        QuantflowError: at stage ``"prepare"``, naming the node.
    """
    written = written_tensors(graph, caller=False)
    for node in graph.nodes:
        annotation, base = annotation_of(node), written_by(node)
        if annotation is None or node not in written:
            continue
        if annotation.output_qspec is not None or (
            base is not None and annotation.input_qspec_map.get(base) is not None
        ):
            raise _refusal("prepare", node if base is not None else _writer(node))


def check_observed_writes(module: GraphModule) -> None:
    """Raise if an observed tensor of a prepared graph is written in place and read elsewhere.

    Raises:
        QuantflowError: at stage ``"convert"``, naming the node.
    """
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        base, names, observed = written_by(node), list[Node](), False
        while base is not None:
            names.append(base)
            observes = observer_of(base, module) is not None
            observed = observed or observes
            base = node_argument(base) if observes else aliased_by(base)
        seen_later = any(order[user] > order[node] for name in names for user in name.users)
        if observed and (names[-1].op == "get_attr" or seen_later):
            raise _refusal("convert", node)


def _writer(node: Node) -> Node:
    """The node that writes into the memory of ``node``."""
    for user in node.users:
        if written_by(user) is node:
            return user
        if aliased_by(user) is node and (found := _writer(user)) is not user:
            return found
    return node


def _refusal(stage: str, node: Node) -> QuantflowError:
    reason = f"the quantizer asks for integers where {node.target} writes into a tensor that other nodes read"
    remedy = "leave the layer in float, as quantizers.XNNPACKQuantizer does, or write it without in-place operators"
    return QuantflowError(stage, reason, node=label(node), remedy=remedy)
