"""Comparison of the indices from sort-like operators, in which kernels order equal values differently."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, argument, aten, is_view, node_argument, op

_ORDERS = (
    aten.sort.default,
    aten.topk.default,
    aten.median.dim,
    aten.kthvalue.default,
)  # without stable sort, whose order is unique
_INDICES = 1  # the position of the indices in their results
_COPIES = {aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default} | INFERENCE_IDENTITIES


@dataclass
class Ordering:
    """The values that the indices of one output point into.

    Attributes:
        dim: The dimension of the order.
        values: The values, one tensor for each call of the graph.
    """

    dim: int
    values: list[torch.Tensor] = field(default_factory=list)

    def pointed_at(self, call: int, rows: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Return the values at ``indices`` and the number of different positions; None if an index is out of range.

        Args:
            call: The number of the call.
            rows: The position in the flat ``values`` at which the row of each index begins.
            indices: The indices as an output, of any dtype.
        """
        values, indices = self.values[call], indices.long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < _size(values, self.dim):
            return None
        places = rows + indices * _step(values, self.dim)
        return values.flatten()[places], places.unique().numel()

    def record(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Store ``values``, and return the position in the flat values at which the row of each index begins."""
        self.values.append(values.detach().clone())
        if not values.ndim:
            return torch.zeros_like(indices)
        starts = torch.arange(values.numel(), device=values.device).reshape(values.shape).narrow(self.dim, 0, 1)
        return starts.expand(indices.shape) if indices.ndim == values.ndim else starts.squeeze(self.dim)


def return_rows(graph: GraphModule, output: int) -> Ordering | None:
    """Replace an index output of ``graph`` by the position at which the row of each index begins in the ordered values.

    Returns:
        The ordered values; None, with the graph unchanged, if the output is not the indices of a sort-like operator, possibly
        after views and copies.
    """
    end = graph.graph.output_node()
    results = list(end.args[0]) if isinstance(end.args[0], (list, tuple)) else [end.args[0]]
    given, moves = results[output], list[Node]()
    while isinstance(given, Node) and not _is_order(given):
        if given.target is not operator.getitem and not is_view(given) and op(given) not in _COPIES:
            return None
        moves.append(given)
        given = given.args[0]
    if not isinstance(given, Node):
        return None
    order = given if op(given) is aten.argsort.default else node_argument(given)
    ordering = Ordering(argument(order, "dim"))
    with graph.graph.inserting_after(given):
        moved = graph.graph.call_function(ordering.record, (order.args[0], given))
    with graph.graph.inserting_before(end):
        for node in reversed([node for node in moves if op(node) not in _COPIES]):
            moved = graph.graph.create_node(node.op, node.target, (moved, *node.args[1:]), node.kwargs)
    results[output] = moved
    end.args = (type(end.args[0])(results),) if isinstance(end.args[0], (list, tuple)) else (moved,)
    graph.recompile()
    return ordering


def _is_order(node: Node) -> bool:
    given = node.args[0] if node.target is operator.getitem else None
    indices = isinstance(given, Node) and op(given) in _ORDERS and bool(node.args[1] == _INDICES)
    return indices or op(node) is aten.argsort.default


def _size(values: torch.Tensor, dim: int) -> int:
    return values.shape[dim] if values.ndim else 1


def _step(values: torch.Tensor, dim: int) -> int:
    return math.prod(values.shape[dim % values.ndim + 1 :]) if values.ndim else 1
