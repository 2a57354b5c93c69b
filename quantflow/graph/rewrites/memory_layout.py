"""The memory layout of rewritten products. It stays that of the original operator, for views and writes through them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantflow.graph.aten import aten, only_user, op, tensor_value, value
from quantflow.graph.rewrites.rewriting import call_before

_PERMUTES = frozenset({aten.permute.default, aten.transpose.int})
_COPIES = frozenset({aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, aten.view.default})


def known(node: Node) -> bool:
    """Whether :func:`laid_out` supports the layout of ``node``."""
    val = value(node)
    return val is not None and _order(val) is not None


def laid_out(node: Node, product: Node) -> Node:
    """Return ``product``, which is contiguous and has the shape of ``node``, in the layout of ``node``."""
    order = _order(tensor_value(node))
    assert order is not None
    if order == sorted(order) or _is_copied_next(node, product):
        return product
    ordered = call_before(node, aten.contiguous.default, call_before(node, aten.permute.default, product, order))
    return call_before(node, aten.permute.default, ordered, [order.index(dim) for dim in range(len(order))])


def _is_copied_next(node: Node, product: Node) -> bool:
    """Whether only permutations lie between ``node`` and a copy into contiguous memory, so that no node sees its layout.

    The permutations then get the strides that follow from ``product``, and a view after them becomes a reshape.
    """
    passed: list[Node] = []
    reader = only_user(node)
    while reader is not None and op(reader) in _PERMUTES:
        passed.append(reader)
        reader = only_user(reader)
    val = None if reader is None else value(reader)
    if reader is None or val is None or op(reader) not in _COPIES or not _lies(val, range(val.ndim)):
        return False
    if reader.target is aten.view.default:
        reader.target = aten.reshape.default
    given = product.meta["val"]
    for permutation in passed:
        with given.fake_mode:
            given = permutation.meta["val"] = cast(Callable, permutation.target)(given, *permutation.args[1:])
    return True


def _order(val: torch.Tensor) -> list[int] | None:
    """The dimensions of ``val`` from the outermost in memory to the innermost, or None if there are gaps."""
    return next((list(order) for order in itertools.permutations(range(val.ndim)) if _lies(val, order)), None)


def _lies(val: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether the memory of ``val`` has its dimensions in ``order``, without gaps."""
    step: int | torch.SymInt = 1
    for dim in reversed(order):
        size = val.shape[dim]
        if not statically_known_true(size == 1) and not statically_known_true(val.stride(dim) == step):
            return False
        step = step * size
    return True
