"""Rewrites of core ATen operators into the operators that decompose into them, exact, for programs captured decomposed."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, tensor_value, value
from quantflow.graph.modes import BATCH_NORM
from quantflow.graph.rewrites.rewriting import Replacement, Rewrite, call_before, reads_part
from quantflow.upstream.operators import OpOverload

_PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def convolution(module: GraphModule, node: Node) -> Node | None:
    """Write ``aten.convolution`` as a convolution over one, two or three dimensions."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "output_padding", "groups")
    x, weight, bias, stride, padding, dilation, output_padding, groups = (argument(node, name) for name in names)
    dims = len(stride)
    if value(weight) is None or tensor_value(weight).ndim != dims + 2 or not 1 <= dims <= 3:
        return None
    if not argument(node, "transposed"):
        return call_before(node, _PLAIN[dims - 1], x, weight, bias, stride, padding, dilation, groups)
    sides = (stride, padding, output_padding, groups, dilation)
    return call_before(node, _TRANSPOSED[dims - 1], x, weight, bias, *sides)


def batch_norm(module: GraphModule, node: Node) -> Replacement:
    """Write a batch norm in inference mode as ``aten.batch_norm``, if only its normalized output is read."""
    if reads_part(node, 1) or reads_part(node, 2):
        return None
    names = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    *given, momentum, eps = (argument(node, name) for name in names)
    return [call_before(node, BATCH_NORM, *given, False, momentum, eps, False)]


COMPOSITE_REWRITES: dict[OpOverload, Rewrite] = {
    aten.convolution.default: convolution,
    aten._native_batch_norm_legit_no_training.default: batch_norm,
}
