"""Rewrites of activations into arithmetic that backends support, exact in float."""

from __future__ import annotations

import math

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, has_argument, is_float_tensor, value
from quantflow.graph.rewrites.poles import feeds_a_pole
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before
from quantflow.upstream.operators import OpOverload


def silu(module: GraphModule, node: Node) -> Node | None:
    """Write SiLU as ``x·sigmoid(x)``."""
    x = argument(node, "self")
    return call_before(node, aten.mul.Tensor, x, call_before(node, aten.sigmoid.default, x))


def hardsigmoid(module: GraphModule, node: Node) -> Node | None:
    """Write hard sigmoid as ``relu((clamp(x, -3 - 6/254, 3) + 3)·(1/6))``. The clamped range then has 255 steps, and 3 is 127
    steps, so the sum is exact in int8. With a limit of -3, each sum would lie halfway between two integers.
    """
    val = value(node)
    if val is None or not val.ndim:
        return None  # int8 kernels do not support scalars
    clamped = call_before(node, aten.hardtanh.default, argument(node, "self"), -3.0 - 6 / 254, 3.0)
    shifted = call_before(node, aten.add.Tensor, clamped, constant_before(module, node, 3.0))
    return call_before(
        node, aten.relu.default, call_before(node, aten.mul.Tensor, shifted, constant_before(module, node, 1 / 6))
    )


def clamp(module: GraphModule, node: Node) -> Node | None:
    """Write a clamp between numbers as ``hardtanh``, which backends fuse."""
    x = argument(node, "self")
    limits = [argument(node, name) if has_argument(node, name) else None for name in ("min", "max")]
    if not all(limit is None or isinstance(limit, (int, float)) for limit in limits):
        return None
    if not is_float_tensor(node) or not is_float_tensor(x) or feeds_a_pole(node):
        return None
    low, high = (default if x is None else float(x) for x, default in zip(limits, (-math.inf, math.inf), strict=True))
    return call_before(node, aten.hardtanh.default, x, low, high)


ACTIVATION_REWRITES: dict[OpOverload, Rewrite] = {
    aten.silu.default: silu,
    aten.hardsigmoid.default: hardsigmoid,
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), clamp),
}
