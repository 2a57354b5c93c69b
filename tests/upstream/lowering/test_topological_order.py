"""Sorting in place gives the order of torch's sort, with the nodes that are there."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.passes.tools_common import legalize_graph

from quantflow.upstream.lowering.topological_order import sort_nodes

TARGETS = (operator.neg, torch.relu, operator.add, torch.sub)


def module_of(rows, moves):
    """A graph of calls of older nodes, some of which are moved to another place in it."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for target, first, second in rows:
        args = tuple(nodes[i % len(nodes)] for i in (first, second)[: 1 + target // 2])
        nodes.append(graph.call_function(TARGETS[target], args))
    output = graph.output(tuple(nodes[-2:]))
    for place, move in moves:
        node, before = nodes[2 + place % len(rows)], nodes[move % len(nodes)]
        if node is not before:
            before.prepend(node)
    assert output.op == "output"
    return fx.GraphModule(nn.Module(), graph)


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)
MOVES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4)


@given(ROWS, MOVES)
def test_order_is_that_of_torch(rows, moves):
    ours, theirs = module_of(rows, moves), module_of(rows, moves)
    kept = set(ours.graph.nodes)
    sort_nodes(ours)
    legalize_graph(theirs)
    assert [(n.name, str(n.args)) for n in ours.graph.nodes] == [(n.name, str(n.args)) for n in theirs.graph.nodes]
    assert set(ours.graph.nodes) == kept
    ours.graph.lint()


def test_a_cycle_is_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.relu, (x,))
    second = graph.call_function(torch.relu, (first,))
    graph.output(second)
    first.args = (second,)
    with pytest.raises(RuntimeError, match="cycles"):
        sort_nodes(fx.GraphModule(nn.Module(), graph))
