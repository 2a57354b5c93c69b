"""Rewrites of matrix products into linear layers and batched products, and of attention into the latter, exact in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantflow.graph.aten import (
    CONVOLUTIONS,
    LINEARS,
    TRANSPOSED_CONVOLUTIONS,
    argument,
    aten,
    is_float_tensor,
    op,
    tensor_value,
    value,
)
from quantflow.graph.constants import constant_values, follows_from_constants
from quantflow.graph.parameters import is_constant
from quantflow.graph.rewrites import memory_layout
from quantflow.graph.rewrites.rewriting import (
    Rewrite,
    call_before,
    constant_before,
    open_shape,
    open_sizes,
    tensor_before,
)
from quantflow.upstream.operators import OpOverload


def no_batches(first: Node, second: Node) -> str | None:
    """Return why ``first @ second`` is not a batched matrix product of two activations; None if it is."""
    a, b = value(first), value(second)
    if a is None or b is None or min(a.ndim, b.ndim) < 3:
        if is_constant(first) or is_constant(second):
            return "one operand is constant; as the weight of nn.Linear it would be int8"
        ranks = " and ".join(str(val.ndim) if val is not None else "?" for val in (a, b))
        return f"operands of rank {ranks}; products run over batches of matrices"
    batches = a.shape[:-2], b.shape[:-2]
    if a.ndim != b.ndim or not all(statically_known_true(m == n) for m, n in zip(*batches, strict=True)):
        return f"batches of {list(batches[0])} and {list(batches[1])} differ; no product broadcasts"
    folds = a.ndim == 3 or (_folded_shape(first) and _folded_shape(second))
    return None if folds else _VARIES


def whole_product(node: Node) -> str | None:
    """Return why :func:`matmul` does not rewrite ``node``; None if it does."""
    return no_batches(argument(node, "self"), argument(node, "other")) or _unmade(node)


def whole_attention(node: Node) -> str | None:
    """Return why :func:`attention` does not rewrite ``node``; None if it does."""
    query, key, given = (argument(node, name) for name in ("query", "key", "value"))
    if argument(node, "dropout_p"):
        return "it drops out in inference too"
    if argument(node, "enable_gqa"):
        return "its heads share keys; no product broadcasts"
    return no_batches(query, key) or no_batches(query, given) or _unmade(node) or _unfit_mask(node)


def _unmade(node: Node) -> str | None:
    """Why no batched matrix product can replace ``node``, independent of its operands."""
    val = value(node)
    if val is None or (val.ndim > 3 and open_shape(node) is None):
        return _VARIES
    return None if memory_layout.known(node) else "the memory layout of its result has gaps"


def matmul(module: GraphModule, node: Node) -> Node | None:
    """Write a product with a constant matrix as a linear layer, and one of two batches of matrices, of any rank, as ``bmm``."""
    if (layer := _linear(node, argument(node, "self"), argument(node, "other"))) is not None:
        return layer
    if whole_product(node):
        return None
    first, second = argument(node, "self"), argument(node, "other")
    return _unfolded(node, call_before(node, aten.bmm.default, _folded(node, first), _folded(node, second)))


def _unfit_mask(node: Node) -> str | None:
    """Why the mask of an attention can't be added to its scores; None if it can, or if there is none."""
    mask, sides = argument(node, "attn_mask"), _sides(node)
    if not _is_masked(node):
        return None
    if _scores_shape(node) is None:
        return _VARIES
    if argument(node, "is_causal"):
        return None if all(isinstance(side, int) for side in sides) else "its causal mask varies in size"
    if value(mask) is not None and tensor_value(mask).dtype not in (torch.bool, tensor_value(node).dtype):
        return "its mask has another dtype"
    if value(mask) is None or not follows_from_constants(mask):
        return "its mask varies; a constant one would be added to the scores"
    # Attention returns zeros in a row that is masked completely. A softmax returns no numbers there.
    whole = bool((_added(node) > -math.inf).any(-1).all())
    return None if whole else "its mask leaves nothing in a row, where a softmax is not defined"


def _is_masked(node: Node) -> bool:
    return argument(node, "attn_mask") is not None or bool(argument(node, "is_causal"))


def _sides(node: Node) -> list[int | torch.SymInt]:
    """The numbers of queries and of keys of an attention."""
    return [tensor_value(argument(node, name)).shape[-2] for name in ("query", "key")]


def _scores_shape(node: Node) -> list[int] | None:
    return open_sizes([*tensor_value(argument(node, "query")).shape[:-2], *_sides(node)])


def _added(node: Node) -> torch.Tensor:
    """What the constant mask of an attention adds to the scores."""
    mask, dtype = argument(node, "attn_mask"), tensor_value(node).dtype
    if argument(node, "is_causal"):
        kept = torch.ones(*map(int, _sides(node)), dtype=torch.bool).tril()
    else:
        kept = constant_values(cast(GraphModule, node.graph.owning_module), [mask])[mask]
        if kept.dtype != torch.bool:
            return kept
    return torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill(~kept, -math.inf)


def matrix_product(module: GraphModule, node: Node) -> Node | None:
    """Write a product of a matrix and a constant matrix as a linear layer."""
    return _linear(node, argument(node, "self"), argument(node, "mat2"))


def added_product(module: GraphModule, node: Node) -> Node | None:
    """Write a product of a matrix and a constant matrix, plus a constant vector, as a linear layer."""
    bias = argument(node, "self")
    if (
        value(bias) is None
        or not follows_from_constants(bias)
        or argument(node, "beta") != 1
        or argument(node, "alpha") != 1
    ):
        return None
    mat2 = argument(node, "mat2")
    if value(mat2) is None or tensor_value(bias).shape != tensor_value(mat2).shape[1:]:
        return None
    return _linear(node, argument(node, "mat1"), mat2, bias)


def _linear(node: Node, x: Node, matrix: Node, bias: Node | None = None) -> Node | None:
    """The linear layer that multiplies ``x`` by ``matrix``; None if ``matrix`` is not constant."""
    if value(x) is None or value(matrix) is None or not is_float_tensor(node) or not follows_from_constants(matrix):
        return None
    if tensor_value(x).ndim < 2 or tensor_value(matrix).ndim != 2 or follows_from_constants(x):
        return None
    return call_before(node, aten.linear.default, x, call_before(node, aten.transpose.int, matrix, 0, 1), bias)


def attention(module: GraphModule, node: Node) -> Node | None:
    """Write attention as a softmax between two products, with a constant mask added to the scores. The query is scaled because
    it is smaller than the scores, and scaling is exact in integers.
    """
    if whole_attention(node):
        return None
    query, key, given = (_folded(node, argument(node, name)) for name in ("query", "key", "value"))
    scale = argument(node, "scale")
    if scale is None:
        scale = 1 / math.sqrt(tensor_value(query).shape[-1])
    scaled = call_before(node, aten.mul.Tensor, query, constant_before(module, node, scale))
    scores = call_before(node, aten.bmm.default, scaled, call_before(node, aten.transpose.int, key, 1, 2))
    if _is_masked(node):
        scores = _masked(module, node, scores)
    weights = call_before(node, aten.softmax.int, scores, -1)
    return _unfolded(node, call_before(node, aten.bmm.default, weights, given))


def _masked(module: GraphModule, node: Node, scores: Node) -> Node:
    """``scores`` plus the mask. A mask that learns is read as it is, another is a constant."""
    mask, folded = argument(node, "attn_mask"), _folded_shape(scores)
    learned = mask is not None and tensor_value(mask).dtype != torch.bool
    added = mask if learned else tensor_before(module, node, _added(node))
    apart = tensor_value(node).ndim != 3
    if apart:
        scores = call_before(node, aten.reshape.default, scores, _scores_shape(node))
    scores = call_before(node, aten.add.Tensor, scores, added)
    return call_before(node, aten.reshape.default, scores, folded) if apart else scores


def near_softmax(node: Node, along: Callable[[Node], Iterable[Node]], steps: int = 5) -> bool:
    """Whether a path from ``node`` reaches a softmax or an exponential within ``steps`` further operators, with no layer,
    average or norm between. ``along`` gives the next nodes of the path: users or inputs.
    """
    ahead, seen = [node], {node}
    for _ in range(steps + 1):
        ahead = [n for n in {n for passed in ahead for n in along(passed)} - seen if n.op == "call_function"]
        if any(op(n) in _SOFTMAXES for n in ahead):
            return True
        seen.update(ahead)
        ahead = [n for n in ahead if op(n) not in _LEVEL]
    return False


_SOFTMAXES = frozenset(
    {
        *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default),
        *(aten._safe_softmax.default, aten.exp.default),
    }
)
# Operators that end the search: rounding before them has another effect than rounding after them.
_LEVEL = (
    CONVOLUTIONS
    | TRANSPOSED_CONVOLUTIONS
    | LINEARS
    | {
        *(aten.bmm.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.baddbmm.default),
        *(aten.scaled_dot_product_attention.default, aten.embedding.default, aten.mean.dim, aten.mean.default),
        *(aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool2d.default),
        *(aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default, aten.rms_norm.default),
    }
)
_VARIES = "several of its sizes vary"


def _folded_shape(operand: Node) -> list[int] | None:
    shape = tensor_value(operand).shape
    return open_sizes([math.prod(shape[:-2]), *shape[-2:]])


def _folded(node: Node, operand: Node) -> Node:
    """``operand`` with its batch dimensions merged."""
    if tensor_value(operand).ndim == 3:
        return operand
    return call_before(node, aten.reshape.default, operand, _folded_shape(operand))


def _unfolded(node: Node, product: Node) -> Node:
    """``product`` in the shape and the memory layout of ``node``."""
    if tensor_value(node).ndim != 3:
        product = call_before(node, aten.reshape.default, product, open_shape(node))
    return memory_layout.laid_out(node, product)


PRODUCT_REWRITES: dict[OpOverload, Rewrite] = {
    aten.matmul.default: matmul,
    aten.mm.default: matrix_product,
    aten.addmm.default: added_product,
    aten.scaled_dot_product_attention.default: attention,
}
