"""Operators as others that backends have: exact in float, so that a quantized graph can be all integers.

Each rewrite takes a node and returns the one that replaces it, or None where it does not apply. :data:`REWRITES` says which
belongs to which operator; a quantizer names those that its backend needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantflow.aten import (
    CONVOLUTIONS,
    LINEARS,
    argument,
    aten,
    has_argument,
    is_float_tensor,
    is_inplace,
    is_view,
    op,
    pair,
    value,
)
from quantflow.graph.parameters import read_attribute, unused_name
from quantflow.graph.state import written_tensors

Rewrite = Callable[[GraphModule, Node], Node | None]


def rewrite(module: GraphModule, rewrites: Mapping[Any, Rewrite]) -> GraphModule:
    """Apply ``rewrites``, by operator, to every node of ``module``, in place."""
    changed, written = False, written_tensors(module.graph)
    for node in list(module.graph.nodes):
        apply = rewrites.get(op(node))
        replacement = apply(module, node) if apply is not None and node not in written else None
        if replacement is None:
            continue
        changed = True
        if replacement is not node:
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
    if changed:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return module


def _feeds_a_pole(node: Node, steps: int = 4) -> bool:
    """Whether what ``node`` computes soon meets a function that is steep near zero, where a grid has few levels."""
    for user in node.users:
        denominator = op(user) is aten.div.Tensor and user.args[1] is node
        if denominator or op(user) in _STEEP or (steps and op(user) not in _GEMM and _feeds_a_pole(user, steps - 1)):
            return True
    return False


def _call(node: Node, target: Any, *args: Any) -> Node:
    """A call of ``target`` before ``node``, of the same layer."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
    values = map_arg(args, lambda n: n.meta["val"])
    mode = getattr(value(node), "fake_mode", None) or next(
        (n.meta["val"].fake_mode for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")), None
    )
    if mode is not None:
        with mode:
            new.meta["val"] = target(*values)
    return new


def _constant(module: GraphModule, node: Node, number: float, shape: tuple[int, ...] = (1,)) -> Node:
    """A read of a tensor full of ``number``, in the dtype of ``node``, before it: a buffer that no checkpoint holds."""
    name = unused_name(module, f"{node.name}_constant")
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    dtype = value(node).dtype  # type: ignore[union-attr]
    module.register_buffer(name, torch.full(shape, number, dtype=dtype, device=device), persistent=False)
    return read_attribute(module, name, node, node)


def _shape(node: Node) -> list[int] | None:
    """The shape of the value of ``node`` with -1 for the dimension that varies, or for the first (a graph is called with other
    batches than its example's); None where more than one varies.
    """
    val = value(node)
    return None if val is None else _open(val.shape)


def _open(shape: Sequence[int | torch.SymInt]) -> list[int] | None:
    """``shape`` as :func:`_shape` has it."""
    sizes = [s if isinstance(s, int) else -1 for s in shape]
    if -1 not in sizes and 0 not in sizes:
        sizes[:1] = [-1] * len(sizes[:1])
    return sizes if sizes.count(-1) <= 1 else None


def silu(module: GraphModule, node: Node) -> Node | None:
    """``x·sigmoid(x)``."""
    x = argument(node, "self")
    return _call(node, aten.mul.Tensor, x, _call(node, aten.sigmoid.default, x))


def hardsigmoid(module: GraphModule, node: Node) -> Node | None:
    """``relu((clamp(x, -3 - 6/254, 3) + 3)·(1/6))``. From there to 3 are 255 steps of which 127 make 3, so the sum is exact;
    with -3, each would lie halfway between two steps.
    """
    clamped = _call(node, aten.hardtanh.default, argument(node, "self"), -3.0 - 6 / 254, 3.0)
    shifted = _call(node, aten.add.Tensor, clamped, _constant(module, node, 3.0))
    return _call(node, aten.relu.default, _call(node, aten.mul.Tensor, shifted, _constant(module, node, 1 / 6)))


def clamp(module: GraphModule, node: Node) -> Node | None:
    """A clamp between numbers as ``hardtanh``, which backends fuse."""
    x = argument(node, "self")
    limits = [argument(node, name) if has_argument(node, name) else None for name in ("min", "max")]
    if not all(limit is None or isinstance(limit, (int, float)) for limit in limits):
        return None
    if not is_float_tensor(node) or not is_float_tensor(x) or _feeds_a_pole(node):
        return None
    low, high = (default if x is None else float(x) for x, default in zip(limits, (-math.inf, math.inf), strict=True))
    return _call(node, aten.hardtanh.default, x, low, high)


def reshape(module: GraphModule, node: Node) -> Node | None:
    """A change of shape as a view."""
    sizes = _shape(node)
    return None if sizes is None else _call(node, aten.reshape.default, node.args[0], sizes)


def mean(module: GraphModule, node: Node) -> Node | None:
    """A mean over height and width that drops them, as one that keeps them and a view."""
    x, dims, sizes = node.args[0], argument(node, "dim"), _shape(node)
    rank = len(value(x).shape) if value(x) is not None else 0  # type: ignore[arg-type, union-attr]
    if argument(node, "keepdim") or sizes is None or rank != 4 or sorted(d % 4 for d in dims or []) != [2, 3]:
        return None
    if argument(node, "dtype") is not None:
        return None
    return _call(node, aten.reshape.default, _call(node, aten.mean.dim, x, [2, 3], True), sizes)


def select(module: GraphModule, node: Node) -> Node | None:
    """One index of a dimension as a slice and a view."""
    sizes, dim, index = _shape(node), argument(node, "dim"), argument(node, "index")
    if sizes is None or not isinstance(index, int) or index < 0:
        return None
    return _call(node, aten.reshape.default, _call(node, aten.slice.Tensor, node.args[0], dim, index, index + 1), sizes)


def split(module: GraphModule, node: Node) -> Node | None:
    """Parts as slices, each for itself; those of an ``unbind`` without the dimension."""
    dim, start, drops = argument(node, "dim"), 0, op(node) is aten.unbind.int
    parts = node.meta.get("val")
    users = list(node.users)
    if not isinstance(parts, (list, tuple)) or any(getattr(u.target, "__name__", "") != "getitem" for u in users):
        return None
    if any((_shape(u) is None) if drops else not isinstance(value(u).shape[dim], int) for u in users):  # type: ignore[union-attr]
        return None
    for index, part in enumerate(parts):
        end = start + (1 if drops else part.shape[dim])
        for user in [u for u in users if u.args[1] == index]:
            new = _call(user, aten.slice.Tensor, node.args[0], dim, start, end)
            user.replace_all_uses_with(_call(user, aten.reshape.default, new, _shape(user)) if drops else new)
            module.graph.erase_node(user)
        start = end
    return node


def average_pool(module: GraphModule, node: Node) -> Node | None:
    """An average over windows as a depthwise convolution, whose equal weights are exact in int8."""
    x = node.args[0]
    val = value(x)  # type: ignore[arg-type]
    kernel, padding = pair(argument(node, "kernel_size")), pair(argument(node, "padding"))
    whole = argument(node, "count_include_pad") or padding == [0, 0]
    if val is None or val.ndim != 4 or argument(node, "ceil_mode") or not whole or argument(node, "divisor_override"):
        return None
    channels = val.shape[1]
    weight = _constant(module, node, 1 / (kernel[0] * kernel[1]), (channels, 1, *kernel))
    stride = pair(argument(node, "stride") or kernel)
    return _call(node, aten.conv2d.default, x, weight, None, stride, padding, [1, 1], channels)


def adaptive_pool(module: GraphModule, node: Node) -> Node | None:
    """An average over windows that divide the image: the mean where there is one, nothing where they are single pixels, else as
    :func:`average_pool`. (Over channels that lie last in memory, the pool of one window decomposes into a mean and a restride.)
    """
    x = node.args[0]
    val, size = value(x), pair(argument(node, "output_size"))  # type: ignore[arg-type]
    sizes = list(val.shape[2:]) if val is not None and val.ndim == 4 else []
    if sizes and size == [1, 1]:
        return _call(node, aten.mean.dim, x, [2, 3], True)
    if not sizes or not all(isinstance(s, int) and o and s % o == 0 for s, o in zip(sizes, size, strict=True)):
        return None
    if sizes == size:
        return x  # type: ignore[return-value]
    window = [s // o for s, o in zip(sizes, size, strict=True)]
    return average_pool(module, _call(node, aten.avg_pool2d.default, x, window))


def same_padding(module: GraphModule, node: Node) -> Node | None:
    """A convolution with ``padding="same"`` as one with numbers; what is one longer at the end is padded before it."""
    x, padding = node.args[0], argument(node, "padding")
    weight, val = value(argument(node, "weight")), value(x)  # type: ignore[arg-type]
    if padding not in ("same", "valid") or weight is None or val is None or val.ndim != weight.ndim:
        return None
    spatial = weight.ndim - 2
    dilation = list(argument(node, "dilation"))
    dilation = dilation * spatial if len(dilation) == 1 else dilation
    totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        longer = [n for total in reversed(totals) for n in (0, total % 2)]
        x = _call(node, aten.constant_pad_nd.default, x, longer, 0.0)
    given = [argument(node, name) for name in ("weight", "bias", "stride")]
    halves = [total // 2 for total in totals]
    return _call(node, _NUMBERED[op(node)], x, *given, halves, argument(node, "dilation"), argument(node, "groups"))


def scalar_operand(module: GraphModule, node: Node) -> Node | None:
    """A number among the operands as a constant tensor."""
    numbers = [a for a in node.args[:2] if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if len(numbers) != 1 or not is_float_tensor(node) or node.kwargs or value(node).ndim == 0:  # type: ignore[union-attr]
        return None
    if has_argument(node, "alpha") and argument(node, "alpha") != 1:
        return None
    number, target, swap = float(numbers[0]), op(node), False
    if target in _SUMS and _feeds_a_pole(node):
        return None
    if target in (aten.div.Tensor, aten.div.Scalar):
        if isinstance(node.args[0], (int, float)) or abs(number) < torch.finfo(value(node).dtype).tiny:  # type: ignore[union-attr]
            return None
        number, target = 1 / number, aten.mul.Tensor
    elif target is aten.rsub.Scalar:
        target, swap = aten.sub.Tensor, True
    constant = _constant(module, node, number)
    target = _TENSOR_FORM.get(target, target)
    operands = [constant if isinstance(a, (int, float)) else a for a in node.args[:2]]
    return _call(node, target, *(reversed(operands) if swap else operands))


def cat(module: GraphModule, node: Node) -> Node | None:
    """One tensor joined is that tensor."""
    tensors = argument(node, "tensors")
    if len(tensors) != 1 or any(is_inplace(user) or is_view(user) for user in (*node.users, *tensors[0].users)):
        return None
    return tensors[0]


def alias(module: GraphModule, node: Node) -> Node | None:
    """A second name for a tensor (a slice that leaves nothing out is traced as one) is that tensor."""
    return node.args[0]  # type: ignore[return-value]


_TENSOR_FORM = {aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor, aten.mul.Scalar: aten.mul.Tensor}

_NUMBERED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}

_SUMS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar}
_STEEP = {
    *(aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar),
}
_GEMM = CONVOLUTIONS | LINEARS

REWRITES: dict[Any, Rewrite] = {
    aten.silu.default: silu,
    aten.hardsigmoid.default: hardsigmoid,
    aten.mean.dim: mean,
    aten.select.int: select,
    aten.cat.default: cat,
    aten.alias.default: alias,
    aten.adaptive_avg_pool2d.default: adaptive_pool,
    **dict.fromkeys(_NUMBERED, same_padding),
    aten.avg_pool2d.default: average_pool,
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), clamp),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), reshape),
    **dict.fromkeys((aten.unsqueeze.default, aten.unflatten.int), reshape),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.unbind.int), split
    ),
    **dict.fromkeys(
        (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar, *_TENSOR_FORM),
        scalar_operand,
    ),
}
