"""Products of two activations, and attention, as products of batches of matrices: exact in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantflow.aten import INFERENCE_IDENTITIES, argument, aten, op, value
from quantflow.graph.parameters import is_constant
from quantizers.rewrites import Rewrite, _call, _constant, _open, _shape


def no_batches(first: Node, second: Node) -> str | None:
    """Why ``first @ second`` is no product of two batches of matrices; None where it is."""
    if is_constant(first) or is_constant(second):
        return "one operand is constant; as the weight of nn.Linear it would be int8"
    a, b = value(first), value(second)
    if a is None or b is None or min(a.ndim, b.ndim) < 3:
        ranks = " and ".join(str(val.ndim) if val is not None else "?" for val in (a, b))
        return f"operands of rank {ranks}; products run over batches of matrices"
    batches = a.shape[:-2], b.shape[:-2]
    if a.ndim != b.ndim or not all(statically_known_true(m == n) for m, n in zip(*batches, strict=True)):
        return f"batches of {list(batches[0])} and {list(batches[1])} differ; no product broadcasts"
    return None if _folded_shape(first) and _folded_shape(second) else "several of its sizes vary"


def matmul(module: GraphModule, node: Node) -> Node | None:
    """A product of two batches of matrices, of any rank, as ``bmm``."""
    first, second = argument(node, "self"), argument(node, "other")
    if no_batches(first, second) or _shape(node) is None:
        return None
    return _unfolded(node, _call(node, aten.bmm.default, _folded(node, first), _folded(node, second)))


def attention(module: GraphModule, node: Node) -> Node | None:
    """Attention without a mask as a softmax between two products. What is scaled is the query: it is smaller than the scores,
    and scaling is exact in integers.
    """
    operands = [argument(node, name) for name in ("query", "key", "value")]
    if has_mask(node) or any(no_batches(operands[0], other) for other in operands[1:]) or _shape(node) is None:
        return None
    query, key, given = (_folded(node, operand) for operand in operands)
    scale = argument(node, "scale")
    if scale is None:
        scale = 1 / math.sqrt(value(query).shape[-1])  # type: ignore[union-attr]
    scaled = _call(node, aten.mul.Tensor, query, _constant(module, node, scale))
    scores = _call(node, aten.bmm.default, scaled, _call(node, aten.transpose.int, key, 1, 2))
    weights = _call(node, aten.softmax.int, scores, -1)
    return _unfolded(node, _call(node, aten.bmm.default, weights, given))


def has_mask(node: Node) -> bool:
    """Whether the attention ``node`` has a mask, drops out, or shares keys between heads."""
    options = ("is_causal", "dropout_p", "enable_gqa")
    return argument(node, "attn_mask") is not None or any(argument(node, name) for name in options)


def near_softmax(node: Node, along: Callable[[Node], Iterable[Node]], steps: int = 5) -> bool:
    """Whether a softmax lies ``along`` a path from ``node`` (its users, or its inputs), behind sums, scalings, masks and
    changes of shape at most.
    """
    ahead = list(along(node))
    if any(op(n) in SOFTMAXES for n in ahead):
        return True
    return steps > 0 and any(op(n) in _BESIDE and near_softmax(n, along, steps - 1) for n in ahead)


SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})
_BESIDE = INFERENCE_IDENTITIES | {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.masked_fill.Scalar, aten.where.self),
    *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int),
    *(aten.contiguous.default, aten.clone.default, aten.slice.Tensor, aten.expand.default),
}


def _folded_shape(operand: Node) -> list[int] | None:
    shape = value(operand).shape  # type: ignore[union-attr]
    return _open([math.prod(shape[:-2]), *shape[-2:]])


def _folded(node: Node, operand: Node) -> Node:
    """``operand`` with its batch dimensions as one, before ``node``."""
    if value(operand).ndim == 3:  # type: ignore[union-attr]
        return operand
    return _call(node, aten.reshape.default, operand, _folded_shape(operand))


def _unfolded(node: Node, product: Node) -> Node:
    """``product`` in the shape of ``node``, before it."""
    return product if value(node).ndim == 3 else _call(node, aten.reshape.default, product, _shape(node))  # type: ignore[union-attr]


PRODUCT_REWRITES: dict[Any, Rewrite] = {
    aten.matmul.default: matmul,
    aten.scaled_dot_product_attention.default: attention,
}
