"""The table of operators that XNNPACK runs in float.

Each check is that of executorch's XNNPACK partitioner (1.5); ``tests/quantizers/test_partition_forecast.py`` compares the
two. Batch norm is rewritten as a convolution, or as a product and a sum, before partitioning.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quantflow.graph.aten import argument, aten, pair, value
from quantflow.graph.parameters import is_constant
from quantflow.graph.rewrites import NORMALIZATION_REWRITES, ROW_NORM_REWRITES
from quantflow.upstream.operators import OpOverload
from quantizers.kernels import FloatKernels, Runs


def _always(node: Node) -> bool:
    return True


def _unscaled(node: Node) -> bool:
    return argument(node, "alpha") == 1


def _rank(node: Node) -> int:
    val = value(node)
    return val.ndim if val is not None else -1


def _average_pool(node: Node) -> bool:
    padded = argument(node, "count_include_pad") and any(pair(argument(node, "padding")))
    window = pair(argument(node, "kernel_size"))
    divisor = argument(node, "divisor_override")
    return not argument(node, "ceil_mode") and not padded and divisor in (None, window[0] * window[1])


def _max_pool(node: Node) -> bool:
    kernel = pair(argument(node, "kernel_size"))
    stride = pair(argument(node, "stride") or kernel)
    return all(s <= k for s, k in zip(stride, kernel, strict=True))


def _constant_weight(node: Node) -> bool:
    return all(is_constant(given) for given in (argument(node, "weight"), argument(node, "bias")) if given is not None)


def _convolution(node: Node) -> bool:
    return _constant_weight(node) and _rank(argument(node, "weight")) <= 4


def _batch_norm(node: Node) -> bool:
    weight, bias, *statistics = (argument(node, name) for name in ("weight", "bias", "running_mean", "running_var"))
    constant = all(read is None or is_constant(read) for read in (weight, bias, *statistics))
    return _rank(node) >= 2 and constant and None not in statistics


def _several(node: Node) -> bool:
    return len(node.all_input_nodes) > 1


def _in_order(node: Node) -> bool:
    return argument(node, "memory_format") in (None, torch.preserve_format, torch.contiguous_format)


def _padding(node: Node) -> bool:
    return all(p >= 0 for p in argument(node, "pad"))


def _greatest_alone(node: Node) -> bool:
    return _rank(node.all_input_nodes[0]) == 4 and all(user.args[1] == 0 for user in node.users)


def _spatial_mean(node: Node) -> bool:
    dims = sorted(d % 4 for d in argument(node, "dim") or [])
    four = _rank(node.all_input_nodes[0]) == 4
    return four and dims == [2, 3] and argument(node, "keepdim") and argument(node, "dtype") is None


def _square(node: Node) -> bool:
    return argument(node, "exponent") == 2


def _slope(node: Node) -> bool:
    return _rank(node) == 4 and is_constant(argument(node, "weight"))


def _unscaled_elu(node: Node) -> bool:
    return argument(node, "scale") == 1 and argument(node, "input_scale") == 1


def _dense(node: Node) -> bool:
    return argument(node, "step") == 1


def _last(node: Node) -> bool:
    return argument(node, "dim") in (-1, _rank(node) - 1)


def _constant_second(node: Node) -> bool:
    return is_constant(node.args[-1])


_RUNS: dict[OpOverload, Runs] = {
    **dict.fromkeys(
        (
            *(aten.abs.default, aten.neg.default, aten.ceil.default, aten.floor.default, aten.exp.default),
            *(aten.log.default, aten.sin.default, aten.cos.default, aten.sqrt.default, aten.rsqrt.default),
            *(aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.leaky_relu.default),
            *(aten.sigmoid.default, aten.tanh.default, aten.gelu.default, aten.hardswish.default),
            *(aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default, aten.bmm.default),
            *(aten.permute.default, aten.view.default, aten.upsample_bilinear2d.vec, aten.lift_fresh_copy.default),
        ),
        _always,
    ),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _unscaled),
    aten.linear.default: _constant_weight,
    aten.convolution.default: _convolution,
    aten.addmm.default: _constant_second,
    aten.mm.default: _constant_second,
    aten.batch_norm.default: _batch_norm,
    aten.avg_pool2d.default: _average_pool,
    aten.max_pool2d.default: _max_pool,
    aten.mean.dim: _spatial_mean,
    aten.max.dim: _greatest_alone,
    aten.cat.default: _several,
    aten.clone.default: _in_order,
    aten.constant_pad_nd.default: _padding,
    aten.elu.default: _unscaled_elu,
    aten.prelu.default: _slope,
    aten.pow.Tensor_Scalar: _square,
    aten.slice.Tensor: _dense,
    aten.unsqueeze.default: _last,
    aten._softmax.default: _last,
}
_WHOLE = frozenset(
    {
        *(aten.linear.default, aten.hardswish.default, aten.prelu.default, aten.elu.default),
        *(aten.batch_norm.default, aten.max_pool2d.default, aten.upsample_bilinear2d.vec),
    }
)
_BETWEEN = frozenset(
    {
        *(aten.abs.default, aten.neg.default, aten.exp.default, aten.sqrt.default, aten.sigmoid.default),
        *(aten.tanh.default, aten.gelu.default, aten.hardswish.default, aten.elu.default),
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mean.dim),
        *(aten.relu.default, aten.hardtanh.default, aten.clamp.default),
    }
)
XNNPACK_FLOAT = FloatKernels(_RUNS, _WHOLE, _BETWEEN, rewrites={**NORMALIZATION_REWRITES, **ROW_NORM_REWRITES})
