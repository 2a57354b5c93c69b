"""A graph is sorted by moving its nodes, not by copying them: executorch sorts the whole graph for each delegate call.

Names: ``legalize_graph`` of ``executorch.exir.lowered_backend_module``, which is replaced; torch's
``torch.fx.passes.tools_common.legalize_graph`` is what it stands for.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
import operator
from collections import deque

import torch
from torch import fx

from quantflow.upstream.replaced import replaced

_aten = torch.ops.aten
# The operators of assertions, which torch sorts to the front.
_FIRST = frozenset(
    {
        *(operator.add, operator.mul, operator.sub, operator.floordiv, operator.truediv, operator.mod),
        *(operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne),
        *(_aten.sym_constrain_range.default, _aten.sym_constrain_range_for_size.default),
        *(_aten._assert_async.msg, _aten.scalar_tensor.default, _aten._assert_scalar.default),
    }
)


def sort_in_place() -> contextlib.AbstractContextManager:
    """Sorting a graph moves its nodes."""
    from executorch.exir import lowered_backend_module

    return replaced(lowered_backend_module, "legalize_graph", sort_nodes)


def sort_nodes(module: fx.GraphModule) -> fx.GraphModule:
    """Sort the nodes of ``module`` in the order of ``torch.fx.passes.tools_common.legalize_graph``.

    Raises:
        RuntimeError: if the graph has cycles.
    """
    nodes = list(module.graph.nodes)
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    ready = deque(node for node in nodes if not waiting[node])
    order = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                first = user.op == "call_function" and user.target in _FIRST
                ready.appendleft(user) if first else ready.append(user)
    if len(order) < len(nodes):
        raise RuntimeError(f"Input graph has cycles, unable to add {[node for node in nodes if waiting[node]]}")
    previous = None
    for node in order:
        if previous is None and node is not nodes[0]:
            nodes[0].prepend(node)
        elif previous is not None and previous.next is not node:
            previous.append(node)
        previous = node
    return module
