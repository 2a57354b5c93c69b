"""Float convolutions over rows that XNNPACK gets wrong as convolutions over images of one row: exact."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from quantflow.aten import TRANSPOSED_CONVOLUTIONS, argument, aten, op, value
from quantflow.graph.parameters import is_constant
from quantflow.graph.rewrites.padding import same_padding
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape
from quantflow.graph.rewrites.weights import Steps, has_own_weight, reshaped_weight


def convolution(module: GraphModule, node: Node) -> Node | None:
    """A convolution of a constant float weight that others read too, which executorch would make an image twice, or over rows
    that were dequantized.
    """
    x, weight = argument(node, "input"), argument(node, "weight")
    own = has_own_weight(node)
    if not is_constant(weight) or value(x).ndim != 3 or (own and not _is_dequantized(x)):  # type: ignore[union-attr]
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


def _is_dequantized(node: Node) -> bool:
    return node.op == "call_function" and "dequantize" in str(node.target)


_SIDES = ((1, "stride"), (0, "padding"), (1, "dilation"))  # each with what it is along the new dimension

ROW_REWRITES: dict[Any, Rewrite] = dict.fromkeys(
    (aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default), convolution
)
