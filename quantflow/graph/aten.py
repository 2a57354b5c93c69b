"""Reading and writing ATen nodes by the names of their schema, whatever form the call was traced in."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

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

# What is the identity in inference: transparent to quantization, erased by convert.
INFERENCE_IDENTITIES = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.detach.default,
    }
)

# What may return its first argument, or views of it, though the schema tells of no alias.
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

# The same of what takes a list: views of each of its tensors, or of the one tensor in it.
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
def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = target._overloadname
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else target


def op(node: Node) -> Any:
    """The operator that ``node`` calls, an in-place one as its functional twin (``relu_`` as ``relu``); None if the
    node calls none.
    """
    if node.op != "call_function":
        return None
    return _functional(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target


def is_inplace(node: Node) -> bool:
    """Whether ``node`` calls an operator that writes to its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and _functional(node.target) is not node.target


def is_view(node: Node) -> bool:
    """Whether the value of ``node`` shares memory with its first argument, or may."""
    schema = getattr(node.target, "_schema", None)
    alias = schema.returns[0].alias_info if schema is not None and schema.returns else None
    views = node.target in _MAY_ALIAS or (alias is not None and not alias.is_write)
    return views and bool(node.args) and isinstance(node.args[0], Node)


def may_share_memory(node: Node) -> bool:
    """Whether the value of ``node`` shares memory with any of its inputs, or may, and ``node`` writes to none."""
    return is_view(node) or node.target in _MAY_ALIAS_EACH or node.target in _MAY_ALIAS_ONE


def viewed_of_list(node: Node) -> Node | None:
    """The tensor, of those that an operator takes as a list, whose memory the value of ``node`` may share; None of another."""
    if node.target in _MAY_ALIAS_ONE:
        tensors = next(arg for arg in node.args if isinstance(arg, (list, tuple)))
        return tensors[0] if len(tensors) == 1 else None
    return node.args[0].args[0][node.args[1]] if _is_one_of_each(node) else None  # type: ignore[index, union-attr]


def _is_one_of_each(node: Node) -> bool:
    """Whether ``node`` is one result of an operator that gives back each tensor of a list."""
    return node.target is operator.getitem and node.args[0].target in _MAY_ALIAS_EACH  # type: ignore[union-attr]


def returns_whole(node: Node) -> bool:
    """Whether ``node`` returns one of its inputs itself where their shapes and types agree, though no schema says so."""
    return _is_one_of_each(node) or node.target in _MAY_ALIAS or node.target in _MAY_ALIAS_ONE - {aten.einsum.default}


def argument(node: Node, name: str) -> Any:
    """The value of the schema argument ``name`` at the call ``node``, its default where the call leaves it out."""
    for position, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            if position < len(node.args) and not declared.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_argument(node: Node, name: str, value: Any) -> None:
    """Make ``value`` the schema argument ``name`` of the call ``node``, writing out the defaults before it."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, a in enumerate(declared) if a.name == name)
    if name in node.kwargs or declared[position].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    args = [*node.args, *(a.default_value for a in declared[len(node.args) : position + 1])]
    args[position] = value
    node.args = tuple(args)


def has_argument(node: Node, name: str) -> bool:
    """Whether the operator of ``node`` declares an argument ``name``."""
    return any(a.name == name for a in node.target._schema.arguments)  # type: ignore[union-attr]


def value(node: Node) -> torch.Tensor | None:
    """The fake tensor that the trace left on ``node``, None where its value is not one tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def is_float_tensor(node: Node) -> bool:
    """Whether the value of ``node`` is one floating point tensor."""
    val = value(node)
    return val is not None and val.dtype.is_floating_point


def only_user(node: Node) -> Node | None:
    """The one node that uses ``node``, or None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pair(given: int | Sequence[int]) -> list[int]:
    """The two sizes of a window over images, which operators take as one number or as two."""
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * 2 if len(sizes) == 1 else sizes


def clamp_limits(node: Node) -> tuple[float, float] | None:
    """Between which numbers ``node`` clamps its input, None where it is no clamp."""
    target = op(node)
    if target is aten.relu.default:
        return 0.0, math.inf
    if target is aten.relu6.default:
        return 0.0, 6.0
    if target is aten.hardtanh.default:
        return float(argument(node, "min_val")), float(argument(node, "max_val"))
    return None


def layer(node: Node) -> str:
    """The dotted name of the innermost module that ``node`` was traced from, ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def label(node: Node) -> str:
    """What to call ``node`` before a person: its layer where it has one, and its own name."""
    name = layer(node)
    return f"{name} ({node.name})" if name else node.name


def short_name(target: Any) -> str:
    """``aten.conv2d.default`` as ``conv2d``."""
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))
