"""Rewrites of 1-d convolutions that executorch compiles wrongly for XNNPACK, exact."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import TRANSPOSED_CONVOLUTIONS, argument, aten, op, tensor_value
from quantflow.graph.parameters import is_constant, read_attribute, reads_of, set_tensor, tensor_of, unused_name
from quantflow.graph.rewrites.padding import same_padding
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape
from quantflow.graph.rewrites.weights import Steps, has_own_weight, reshaped_weight
from quantflow.upstream.operators import OpOverload


def convolution(module: GraphModule, node: Node) -> Node | None:
    """Write a 1-d convolution with a constant float weight as a 2-d convolution over images of one row, if it is beside a
    quantized operator or shares its weight.

    executorch converts each 1-d weight to 2-d itself, and converts a shared weight twice. A shared int8 weight is copied.
    """
    x, weight = argument(node, "input"), argument(node, "weight")
    if _is_dequantized(weight):
        return _with_own_integers(module, node)
    own = has_own_weight(node)
    if not is_constant(weight) or tensor_value(x).ndim != 3 or (own and not _is_beside_integers(x, node)):
        return None
    numbered = same_padding(module, node) if op(node) is aten.conv1d.padding else node
    if numbered is None:
        return None
    rows, sizes = argument(numbered, "input"), open_shape(node)
    given = open_shape(rows)
    if sizes is None or given is None:
        return None
    image = call_before(node, aten.reshape.default, rows, [*given[:2], 1, given[2]])
    row: Steps = [(aten.unsqueeze.default, 2)]
    flat = reshaped_weight(module, numbered, row, own)
    bias, groups = argument(node, "bias"), argument(node, "groups")
    stride, padding, dilation = ([n, *argument(numbered, name)] for n, name in _SIDES)
    if op(node) in TRANSPOSED_CONVOLUTIONS:
        further = [0, *argument(node, "output_padding")]
        sides = (stride, padding, further, groups, dilation)
        out = call_before(node, aten.conv_transpose2d.input, image, flat, bias, *sides)
    else:
        out = call_before(node, aten.conv2d.default, image, flat, bias, stride, padding, dilation, groups)
    return call_before(node, aten.reshape.default, out, sizes)


def _with_own_integers(module: GraphModule, node: Node) -> Node | None:
    """The convolution ``node`` with its own copy of the integer weight, if others read the weight too."""
    weight = argument(node, "weight")
    read = weight.args[0]
    if node.kwargs or not is_constant(read) or (reads_of(node.graph)[str(read.target)] == 1 and len(weight.users) == 1):
        return None
    name = unused_name(module, f"{read.target}_own")
    set_tensor(module, name, tensor_of(module, read).clone(), parameter=False)
    copied = read_attribute(module, name, node, read)
    own = call_before(node, weight.target, copied, *weight.args[1:])
    return call_before(node, op(node), *(own if given is weight else given for given in node.args))


def _is_dequantized(node: Node) -> bool:
    return node.op == "call_function" and "dequantize" in str(node.target)


def _is_beside_integers(x: Node, node: Node) -> bool:
    """Whether ``x``, an input of ``node``, was dequantized, or the output of ``node`` is quantized."""
    return any(n.op == "call_function" and "quantize" in str(n.target) for n in (x, *node.users))


_SIDES = ((1, "stride"), (0, "padding"), (1, "dilation"))  # each with its value along the new dimension

ROW_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys(
    (aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default), convolution
)
