"""The batch dimension of each tensor, for graphs that are called with other batch sizes than the example."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from quantflow.graph.aten import is_view, node_argument, tensor_value, value


def batch_dimension(node: Node) -> int | None:
    """Return the batch dimension of the value of ``node``, which has a static shape; None if it has no batch dimension.

    The batch is the first dimension of the graph's inputs. An operator that keeps the number of dimensions, other than a view,
    keeps their order. After an operator that turns several tensors into another number of dimensions, the batch is the first.
    """
    passed: list[tuple[Node, Node]] = []
    while (source := _source(node)) is not None:
        passed.append((node, source))
        node = source
    dim: int | None = 0
    for moved, source in reversed(passed):
        dim = None if dim is None else _carried(moved, source, dim)
    return dim


def includes_batch(node: Node, dims: Collection[int]) -> bool:
    """Whether the batch dimension of the value of ``node``, whose size may differ from the example's, is among ``dims``."""
    return all(isinstance(size, int) for size in tensor_value(node).shape) and batch_dimension(node) in dims


def _source(node: Node) -> Node | None:
    """The input that determines the dimensions of ``node``, or None if there are several or none."""
    call = _call(node)
    given = [n for n in call.all_input_nodes if n.op != "get_attr" and value(n) is not None]
    same = [n for n in given if value(node) is not None and tensor_value(n).ndim == tensor_value(node).ndim]
    return same[0] if same else given[0] if len(given) == 1 else None


def _call(node: Node) -> Node:
    return node_argument(node) if node.target is operator.getitem else node


def _carried(node: Node, source: Node, dim: int) -> int | None:
    """The dimension of ``node`` that grows with dimension ``dim`` of ``source``."""
    given, found = value(source), value(node)
    if given is None or found is None:
        return None
    if given.ndim == found.ndim and not is_view(_call(node)):
        return dim
    if not all(isinstance(size, int) for size in given.shape):
        return None  # another dimension varies, and its symbol already distinguishes it from the batch
    call = _call(node)

    def doubled(other: Node) -> torch.Tensor:
        val = other.meta["val"]
        sizes = [size * 2 if other is source and place == dim else size for place, size in enumerate(val.shape)]
        return torch.empty(sizes, dtype=val.dtype, device="meta")

    try:
        args, kwargs = map_arg((call.args, call.kwargs), doubled)
        result = cast(Callable, call.target)(*args, **kwargs)
    except Exception:  # a view with the example's sizes, or an operator that depends on values
        return None if is_view(call) else dim
    result = result if call is node else result[node.args[1]]
    if result.ndim != found.ndim:
        return None
    return next((place for place, (a, b) in enumerate(zip(result.shape, found.shape, strict=True)) if a != b), None)
