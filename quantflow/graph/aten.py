"""Access to the arguments of ATen nodes by their schema names, independent of how the call was traced."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import Argument

from quantflow.upstream.operators import OpOverload, overload_name, packet_name, schema_of

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
    }
)
TRANSPOSED_CONVOLUTIONS = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)
LINEARS = frozenset({aten.linear.default})
WEIGHTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | LINEARS

# Operators that return their input in inference. Quantization passes through them and convert erases them.
INFERENCE_IDENTITIES = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.detach.default,
    }
)

# Operators that may return their first argument or a view of it, although their schema declares no alias.
_MAY_ALIAS = frozenset(
    {
        aten.type_as.default,
        aten.atleast_1d.default,
        aten.atleast_2d.default,
        aten.atleast_3d.default,
        aten.conj_physical.default,
        aten.dequantize.self,
        aten.sum_to_size.default,
        aten.unsafe_chunk.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
    }
)

# Operators on a list of tensors that may return a view of each tensor, or of the only tensor.
_MAY_ALIAS_EACH = frozenset(
    {
        aten.atleast_1d.Sequence,
        aten.atleast_2d.Sequence,
        aten.atleast_3d.Sequence,
        aten.broadcast_tensors.default,
        aten.meshgrid.default,
        aten.meshgrid.indexing,
    }
)
_MAY_ALIAS_ONE = frozenset({aten.einsum.default, aten.chain_matmul.default, aten.cartesian_prod.default})


@functools.cache
def _functional(target: OpOverload) -> OpOverload:
    namespace, name = schema_of(target).name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = overload_name(target)
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else target


def op(node: Node) -> Any:
    """Return the operator that ``node`` calls, or None if it calls none. An in-place operator is returned in its functional
    form (``relu_`` as ``relu``).
    """
    if node.op != "call_function":
        return None
    return _functional(node.target) if isinstance(node.target, OpOverload) else node.target


def is_inplace(node: Node) -> bool:
    """Whether ``node`` calls an operator that writes to its first argument."""
    return isinstance(node.target, OpOverload) and _functional(node.target) is not node.target


def is_view(node: Node) -> bool:
    """Whether the value of ``node`` may share memory with its first argument."""
    schema = schema_of(node.target)
    alias = schema.returns[0].alias_info if schema is not None and schema.returns else None
    views = node.target in _MAY_ALIAS or (alias is not None and not alias.is_write)
    return views and bool(node.args) and isinstance(node.args[0], Node)


def may_share_memory(node: Node) -> bool:
    """Whether the value of ``node`` may share memory with an input that ``node`` does not write to."""
    return is_view(node) or node.target in _MAY_ALIAS_EACH or node.target in _MAY_ALIAS_ONE


def viewed_of_list(node: Node) -> Node | None:
    """Return the tensor of a list argument whose memory the value of ``node`` may share; None for other operators."""
    if node.target in _MAY_ALIAS_ONE:
        tensors = next(arg for arg in node.args if isinstance(arg, (list, tuple)))
        return cast(Node, tensors[0]) if len(tensors) == 1 else None
    return argument(node_argument(node), "tensors")[node.args[1]] if _is_one_of_each(node) else None


def _is_one_of_each(node: Node) -> bool:
    """Whether ``node`` is one result of an operator that returns each tensor of a list."""
    return node.target is operator.getitem and node_argument(node).target in _MAY_ALIAS_EACH


def returns_whole(node: Node) -> bool:
    """Whether ``node`` returns an input itself if shapes and dtypes are equal, although its schema declares no alias."""
    return _is_one_of_each(node) or node.target in _MAY_ALIAS or node.target in _MAY_ALIAS_ONE - {aten.einsum.default}


def node_argument(node: Node, index: int = 0) -> Node:
    """Return the positional argument ``index`` of ``node``, which is a node by the schema of the operator."""
    return cast(Node, node.args[index])


def argument(node: Node, name: str) -> Any:
    """Return the value of the schema argument ``name`` in the call ``node``, or its default if the call leaves it out."""
    for position, declared in enumerate(schema_of(node.target).arguments):
        if declared.name == name:
            if position < len(node.args) and not declared.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_argument(node: Node, name: str, value: Argument) -> None:
    """Set the schema argument ``name`` of the call ``node`` to ``value``, and write out the defaults before it."""
    declared = schema_of(node.target).arguments
    position = next(i for i, a in enumerate(declared) if a.name == name)
    if name in node.kwargs or declared[position].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    args = [*node.args, *(a.default_value for a in declared[len(node.args) : position + 1])]
    args[position] = value
    node.args = tuple(args)


def has_argument(node: Node, name: str) -> bool:
    """Whether the operator of ``node`` declares an argument ``name``."""
    return any(a.name == name for a in schema_of(node.target).arguments)


def value(node: Node) -> torch.Tensor | None:
    """Return the fake tensor that the trace recorded on ``node``, or None if its value is not a single tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def tensor_value(node: Node) -> torch.Tensor:
    """Return the fake tensor that the trace recorded on ``node``, whose value is known to be a single tensor."""
    return cast(torch.Tensor, value(node))


def is_float_tensor(node: Node) -> bool:
    """Whether the value of ``node`` is a single floating point tensor."""
    val = value(node)
    return val is not None and val.dtype.is_floating_point


def is_half(node: Node) -> bool:
    """Whether the value of ``node`` is a tensor in half precision, of which ATen computes sums in float32."""
    val = value(node)
    return val is not None and val.dtype in (torch.float16, torch.bfloat16)


def only_user(node: Node) -> Node | None:
    """Return the only user of ``node``, or None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pair(given: int | Sequence[int]) -> list[int]:
    """Return the two sizes of a 2-d window, which operators take as one number or as two."""
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * 2 if len(sizes) == 1 else sizes


def clamp_limits(node: Node) -> tuple[float, float] | None:
    """Return the limits to which ``node`` clamps its input, or None if it is no clamp."""
    target = op(node)
    if target is aten.relu.default:
        return 0.0, math.inf
    if target is aten.relu6.default:
        return 0.0, 6.0
    if target is aten.hardtanh.default:
        return float(argument(node, "min_val")), float(argument(node, "max_val"))
    return None


def layer(node: Node) -> str:
    """Return the dotted name of the innermost module that ``node`` was traced from; ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def label(node: Node) -> str:
    """Return the name of ``node`` for messages: its layer, if there is one, and its own name."""
    name = layer(node)
    return f"{name} ({node.name})" if name else node.name


def short_name(target: object) -> str:
    """Return the name of an operator without namespace and overload: ``conv2d`` for ``aten.conv2d.default``."""
    return packet_name(target) or str(getattr(target, "__name__", target))
