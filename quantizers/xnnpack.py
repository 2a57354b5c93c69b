"""The quantizer for XNNPACK: the table of operators that it runs in int8.

Each refusal is a limit of executorch's XNNPACK delegate (1.5): it would not run the node in integers, or not correctly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx import Node

from quantflow.graph.aten import CONVOLUTIONS, LINEARS, argument, aten, node_argument, op, pair, tensor_value, value
from quantflow.graph.rewrites import PATCH_PRODUCT_REWRITES, XNNPACK_REWRITES, Rewrite
from quantflow.graph.rewrites.products import near_softmax, whole_attention, whole_product
from quantflow.graph.rewrites.weights import EQUAL_WEIGHTS
from quantflow.upstream.operators import OpOverload
from quantizers.rule import Rule
from quantizers.rule_quantizer import RuleQuantizer
from quantizers.scheme import DYNAMIC_INT8, DYNAMIC_W4, INT8, Scheme
from quantizers.xnnpack_float import XNNPACK_FLOAT
from quantizers.xnnpack_unsupported import XNNPACK_UNSUPPORTED

CLAMPS = frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default})


def _rank(node: Node) -> int:
    val = value(node)
    return val.ndim if val is not None else -1


def _unbatched(node: Node) -> str | None:
    weight = argument(node, "weight")
    return None if _rank(node) == _rank(weight) else "its input has no batch dimension"


def _high_rank(node: Node) -> str | None:
    ranks = [_rank(n) for n in (node, *node.all_input_nodes)]
    return f"rank {max(ranks)}; XNNPACK has 6 dimensions" if max(ranks) > 6 else None


def _grouped(node: Node) -> str | None:
    groups = argument(node, "groups")
    return None if groups == 1 else f"no per-channel scales for a transposed convolution in {groups} groups"


def _scaled_addend(node: Node) -> str | None:
    return None if math.isclose(argument(node, "alpha"), 1.0) else f"alpha is {argument(node, 'alpha')}, not 1"


def _not_global(node: Node) -> str | None:
    size = list(argument(node, "output_size"))
    return None if size == [1, 1] and _rank(node) == 4 else f"pools to {size}; only [1, 1] is a mean in int8"


def _not_spatial(node: Node) -> str | None:
    dims = argument(node, "dim") or []
    spatial = _rank(node_argument(node)) == 4 and sorted(d % 4 for d in dims) == [2, 3]
    return (
        None if spatial and argument(node, "keepdim") else "only the mean over H and W with keepdim=True runs in int8"
    )


def _pool_gaps(node: Node) -> str | None:
    kernel = tuple(pair(argument(node, "kernel_size")))
    stride = tuple(pair(argument(node, "stride") or kernel))
    if argument(node, "ceil_mode") and not all(isinstance(s, int) for s in tensor_value(node).shape[2:]):
        return "ceil_mode over a size that varies"
    return None if all(s <= k for s, k in zip(stride, kernel, strict=True)) else f"stride {stride} over kernel {kernel}"


def _strided(node: Node) -> str | None:
    return None if argument(node, "step") == 1 else "slices with a step"


def _flat(node: Node) -> str | None:
    return None if _rank(node) == 4 else f"its tensor has rank {_rank(node)}, not 4"


def _scaled_elu(node: Node) -> str | None:
    scaled = argument(node, "scale") != 1 or argument(node, "input_scale") != 1
    return "the delegate drops its scales (as SELU has)" if scaled else None


def _flat_slope(node: Node) -> str | None:
    slope = abs(argument(node, "negative_slope"))
    return None if 2**-6 <= slope <= 16 or slope == 0.01 else f"a slope of {slope}; the kernel multiplies in 1/256"


def _pads(node: Node) -> str | None:
    if op(node) is aten.pad.default and argument(node, "mode") != "constant":
        return f"pads with mode {argument(node, 'mode')!r}, not constant"
    pads, value = argument(node, "pad"), argument(node, "value")
    return None if not value and all(isinstance(p, int) and p >= 0 for p in pads) else "pads with another value than 0"


def _single(node: Node) -> str | None:
    return None if len(argument(node, "tensors")) > 1 else "joins one tensor only"


def _volume(node: Node) -> str | None:
    """The reason for three-dimensional operators that :mod:`quantflow.graph.rewrites.volumes` can't rewrite."""
    return "XNNPACK has two dimensions, and images can't stand for this: its weight is shared or computed, or its size varies"


def _scores(node: Node) -> str | None:
    """Int8 attention scores lose up to 10 dB (``benchmarks/attention.py``): a softmax weights the values that ranges clip."""
    return (
        "a softmax reads it, which is float and amplifies rounding" if near_softmax(node, lambda n: n.users) else None
    )


def _squares(node: Node) -> str | None:
    """A sum of squares, as norms that are written out have it."""
    if EQUAL_WEIGHTS not in node.meta:
        return None
    given = node_argument(node)
    while op(given) in _MOVES:
        given = node_argument(given)
    power = op(given) is aten.pow.Tensor_Scalar or op(given) is aten.square.default
    square = power or (op(given) is aten.mul.Tensor and given.args[0] is given.args[1])
    return "it sums squares, whose range is too wide for eight bits" if square else None


def _weights(node: Node) -> str | None:
    """As :func:`_scores`: most attention weights are far below the largest one, which determines the scale."""
    reads = near_softmax(node, lambda n: n.all_input_nodes)
    return "it reads the weights of a softmax, which are float and mostly small" if reads else None


_PERMUTATIONS = frozenset(
    {
        *(aten.permute.default, aten.transpose.int, aten.mT.default),
        *(aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist),
    }
)
_MOVES = _PERMUTATIONS | {aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.to.dtype}
_OVER_VOLUMES = frozenset({aten.conv3d.default, aten.conv3d.padding})

XNNPACK_RULES = (
    Rule("convolution over volumes", _OVER_VOLUMES, weight="weight", refusals=(_volume,)),
    Rule(
        "convolution",
        CONVOLUTIONS - _OVER_VOLUMES,
        weight="weight",
        batch_norm=True,
        clamps=CLAMPS,
        refusals=(_unbatched,),
    ),
    Rule(
        "transposed convolution",
        frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input}),
        weight="weight",
        weight_axis=1,
        batch_norm=True,
        clamps=CLAMPS,
        refusals=(_unbatched, _grouped),
    ),
    Rule(
        "linear",
        LINEARS,
        weight="weight",
        batch_norm=True,
        clamps=CLAMPS,
        refusals=(_squares,),
        dynamic=True,
    ),
    Rule(
        "add",
        frozenset({aten.add.Tensor}),
        inputs=("self", "other"),
        clamps=CLAMPS,
        refusals=(_scaled_addend,),
        soft_refusals=(_scores,),
    ),
    Rule(
        "subtract",
        frozenset({aten.sub.Tensor}),
        inputs=("self", "other"),
        clamps=CLAMPS,
        refusals=(_scaled_addend,),
        soft_refusals=(_scores,),
    ),
    Rule("multiply", frozenset({aten.mul.Tensor}), ("self", "other"), clamps=CLAMPS, soft_refusals=(_scores,)),
    Rule(
        "product of batches",
        frozenset({aten.bmm.default}),
        inputs=("self", "mat2"),
        symmetric=("mat2",),
        soft_refusals=(_scores, _weights),
    ),
    Rule("product", frozenset({aten.matmul.default}), ("self", "other"), refusals=(whole_product,)),
    Rule(
        "attention",
        frozenset({aten.scaled_dot_product_attention.default}),
        inputs=("query", "key", "value"),
        refusals=(whole_attention,),
    ),
    Rule("hardswish", frozenset({aten.hardswish.default}), ("self",), effective_range=(-3.0, math.inf)),
    Rule("sigmoid", frozenset({aten.sigmoid.default}), ("self",), effective_range=(-8.0, 8.0)),
    Rule("tanh", frozenset({aten.tanh.default}), ("self",), effective_range=(-4.0, 4.0)),
    Rule("gelu", frozenset({aten.gelu.default}), ("self",), effective_range=(-4.0, math.inf)),
    Rule("elu", frozenset({aten.elu.default}), ("self",), effective_range=(-7.0, math.inf), refusals=(_scaled_elu,)),
    Rule("leaky relu", frozenset({aten.leaky_relu.default}), ("self",), refusals=(_flat_slope,)),
    Rule("prelu", frozenset({aten.prelu.default}), ("self", "weight"), refusals=(_flat,)),
    Rule("elementwise", frozenset({aten.abs.default, aten.neg.default}), ("self",)),
    Rule("concatenate", frozenset({aten.cat.default}), inputs=("tensors",), output="shared", refusals=(_single,)),
    Rule(
        "global average pool",
        frozenset({aten.adaptive_avg_pool2d.default}),
        ("self",),
        clamps=CLAMPS,
        refusals=(_not_global,),
    ),
    Rule("mean", frozenset({aten.mean.dim}), ("self",), refusals=(_not_spatial,)),
    Rule("max pool", frozenset({aten.max_pool2d.default}), ("self",), output="shared", refusals=(_flat, _pool_gaps)),
    Rule("clamp", CLAMPS, ("self",), output="shared"),
    Rule(
        "reshape",
        frozenset({aten.flatten.using_ints, aten.view.default, aten.reshape.default}),
        ("self",),
        output="shared",
        refusals=(_high_rank,),
    ),
    Rule("permute", _PERMUTATIONS, ("self",), output="shared"),
    Rule("copy", frozenset({aten.contiguous.default, aten.clone.default}), ("self",), output="shared"),
    Rule(
        "pad",
        frozenset({aten.pad.default, aten.constant_pad_nd.default}),
        ("self",),
        output="shared",
        refusals=(_pads,),
    ),
    Rule("slice", frozenset({aten.slice.Tensor}), ("self",), output="shared", refusals=(_strided,)),
)
"""The operators that XNNPACK runs in int8, as rules; a quantizer for a similar backend can take some of them."""


class XNNPACKQuantizer(RuleQuantizer):
    """Quantizes for XNNPACK: int8 activations per tensor, affine; int8 weights per channel, symmetric.

    Linear layers, and convolutions written as such, also run with dynamic activations, and then with 4-bit weights in groups.
    The arguments are those of :class:`RuleQuantizer`.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import DYNAMIC_INT8, XNNPACKQuantizer
        >>> quantizer = XNNPACKQuantizer(overrides={torch.nn.Linear: DYNAMIC_INT8}, skip="head.*")
        >>> model = torch.nn.Sequential()
        >>> model.body, model.head = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> plan = quantizer.plan(qf.export(model.eval(), (torch.randn(1, 8),)).module())
        >>> [(operator.layer, operator.becomes) for operator in plan.operators]
        [('body', 'dynamic int8'), ('head.0', 'float')]
    """

    rules = XNNPACK_RULES
    rewrites: Mapping[OpOverload, Rewrite] = XNNPACK_REWRITES
    dynamic_rewrites: Mapping[OpOverload, Rewrite] = PATCH_PRODUCT_REWRITES
    float_kernels = XNNPACK_FLOAT
    precisions: Mapping[str, Scheme | None] = {"float": None, "int8": INT8, "4-bit weights": DYNAMIC_W4}
    dynamic = DYNAMIC_INT8
    unsupported = XNNPACK_UNSUPPORTED

    def refuse_scheme(self, scheme: Scheme) -> str | None:
        """Tell why XNNPACK would compute wrongly in a scheme, or not load the program."""
        if not scheme.weight.symmetric:
            return "XNNPACK reads weights as symmetric, whatever their zero point"
        if scheme.activation.per_channel:
            return "XNNPACK has one scale for an activation"
        if scheme.activation.bits != 8 or scheme.activation.group:
            return "XNNPACK saturates activations at 8 bits only, and has no groups for them"
        if group := scheme.weight.group:
            affine = scheme.activation.dynamic and not scheme.activation.symmetric
            fits = affine and scheme.weight.bits == 4 and group % 32 == 0
            return (
                None
                if fits
                else "XNNPACK has groups of multiples of 32 for 4-bit weights with dynamic affine activations"
            )
        if scheme.activation.dynamic and (scheme.activation.symmetric or not scheme.weight.per_channel):
            return "XNNPACK's dynamic int8 has affine activations and per-channel weights"
        return None

    def refuse_node(self, node: Node) -> str | None:
        """Refuse nodes that do not compute in float32: XNNPACK has no int8 form of them."""
        val = value(node)
        return None if val is None or val.dtype == torch.float32 else f"computes in {val.dtype}, not float32"
