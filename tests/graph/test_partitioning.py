"""Delegate calls: nodes of one call have no path between them that leaves the delegate, and calls are few."""

import operator

from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from quantflow.graph.partitioning import delegate_calls


def graph_of(edges, delegated):
    """A graph of calls, each of which reads up to two older ones, or the input."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for first, second in edges:
        nodes.append(graph.call_function(operator.add, (nodes[first % len(nodes)], nodes[second % len(nodes)])))
    graph.output(nodes[-1])
    return graph, {node for node, inside in zip(nodes[1:], delegated, strict=True) if inside}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.booleans()), min_size=1, max_size=14))
def test_no_path_between_two_nodes_of_a_call_leaves_it(rows):
    graph, delegated = graph_of([row[:2] for row in rows], [row[2] for row in rows])
    found = delegate_calls(graph, delegated)
    for call in {found[node] for node in delegated}:
        own = {node for node in delegated if found[node] == call}
        behind = set()  # nodes outside the call that depend on it
        for node in graph.nodes:
            depends = any(read in behind or read in own for read in node.all_input_nodes)
            if node in own:
                assert behind.isdisjoint(node.all_input_nodes)
            elif depends:
                behind.add(node)


def test_a_call_waits_for_the_next_one_if_nothing_else_reads_it():
    graph = Graph()
    x, state = graph.placeholder("x"), graph.placeholder("state")
    early = graph.call_function(operator.neg, (state,))
    outside = graph.call_function(operator.abs, (x,))
    late = graph.call_function(operator.add, (early, outside))
    graph.output((late, early))
    found = delegate_calls(graph, {early, late})
    assert found[early] == found[late]


def test_a_call_that_another_kernel_reads_does_not_wait():
    graph = Graph()
    x = graph.placeholder("x")
    early = graph.call_function(operator.neg, (x,))
    outside = graph.call_function(operator.abs, (early,))
    late = graph.call_function(operator.add, (early, outside))
    graph.output(late)
    found = delegate_calls(graph, {early, late})
    assert found[early] < found[outside] < found[late]
