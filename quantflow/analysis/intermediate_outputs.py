"""Intermediate outputs: tensors within a converted graph as further outputs of it, so that the runtime returns them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from quantflow.analysis.integer_ranges import Grid
from quantflow.analysis.node_matching import computes, converts, source
from quantflow.graph.aten import aten, clamp_limits, is_float_tensor, only_user
from quantflow.graph.parameters import is_constant
from quantflow.graph.state import is_written
from quantflow.upstream import pytree
from quantflow.upstream.operators import packet_name


@dataclass(frozen=True)
class IntermediateOutput:
    """One tensor within the graph that is also an output.

    Attributes:
        node: What computes it, in the converted graph.
        end: The node whose value is looked at: a dequantize node, or ``node`` itself where it stays in float.
        step: Its scale; None in float.
    """

    node: Node
    end: Node
    step: float | None


def intermediate_outputs_of(graph: GraphModule) -> list[IntermediateOutput]:
    """The activations of a converted ``graph`` that a delegate holds as tensors of their own, in order.

    An operator that is fused with its successor (a convolution with its clamp) has no tensor there. A tensor with several
    scales gives one output for each.
    """
    varying = _varying(graph)
    found, seen = [], set()
    for node in graph.graph.nodes:
        if node not in varying:
            continue
        if _is(node, "dequantize_per_tensor") and not _varies(node):
            if node.args[0] not in seen:  # one for all dequantize nodes of the same integers
                seen.add(node.args[0])
                found.append(IntermediateOutput(source(node), node, Grid.of(node, graph).scale))
        elif computes(node) and is_float_tensor(node) and not _goes_to_a_grid(node):
            found.append(IntermediateOutput(node, node, None))
    return found


def with_intermediate_outputs(graph: GraphModule, intermediates: list[IntermediateOutput]) -> GraphModule:
    """A copy of ``graph`` that takes its flat inputs and returns its flat outputs, then the value of each intermediate."""
    opened = copy.deepcopy(graph)
    nodes = {node.name: node for node in opened.graph.nodes}
    output = opened.graph.output_node()
    values = list(pytree.tree_leaves(output.args))
    for intermediate in intermediates:
        end = nodes[intermediate.end.name]
        with opened.graph.inserting_after(end):
            # A new node: the tensor that others read does not change, and their writes do not reach the copy.
            if intermediate.step is not None:
                values.append(opened.graph.node_copy(end))
            else:
                values.append(_times_one(end) if is_written(end) else end)
    output.args = (tuple(values),)
    opened.graph.set_codegen(CodeGen())
    opened.meta.pop("quantflow_signature", None)
    opened.recompile()
    return opened


def _varying(graph: GraphModule) -> set[Node]:
    """The nodes that depend on an input."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(given in found for given in node.all_input_nodes):
            found.add(node)
    return found


def _goes_to_a_grid(node: Node) -> bool:
    """Whether only static quantize nodes read ``node`` or a clamp fused with it: a delegate has no float tensor of it."""
    if node.users and all(_is(user, "quantize_per_tensor") and not _varies(user) for user in node.users):
        return True
    behind = only_user(node)
    return behind is not None and behind.op != "output" and clamp_limits(behind) is not None and _goes_to_a_grid(behind)


def _times_one(node: Node) -> Node:
    """A copy of ``node``: times one, since delegates drop a clone and then return their input."""
    product = node.graph.call_function(aten.mul.Tensor, (node, 1.0))
    product.meta["val"] = node.meta["val"]
    return product


def _varies(conversion: Node) -> bool:
    """Whether the scale of ``conversion`` is chosen at run time."""
    return any(isinstance(q, Node) and not is_constant(q) for q in conversion.args[1:3])


def _is(node: Node, name: str) -> bool:
    return converts(node) and packet_name(node.target).startswith(name)
