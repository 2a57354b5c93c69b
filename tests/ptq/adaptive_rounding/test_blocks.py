"""Blocks make up the network: evaluated one after another they are it, and hand on nothing but their ends."""

from itertools import pairwise

import pytest
import torch
from block_networks import NETWORKS, calibrated, values_of

from quantflow.observers.observation import observer_of
from quantflow.ptq.adaptive_rounding.blocks import blocks
from quantflow.simulation.interpreter import Interpreter
from quantflow.simulation.quantized_layers import quantized_layers


def block_after_block(graph, found, inputs, integers, same):
    """What ``graph`` returns where blocks hand on nothing but their ends."""
    network = Interpreter(graph, quantize=integers)
    given, values, handed = iter(inputs), {}, set(same)
    for block in found:
        for node in block.nodes:
            values[node] = network.value(node, values, given)
        handed |= {*block.ends, *block.constants}
        handed |= {n for n in block.nodes if n.args and n.args[0] in handed and observer_of(n, graph) is not None}
        values = {node: x for node, x in values.items() if node in handed}
    return [values[leaf] for leaf in returned_by(graph)]


def returned_by(graph):
    return torch.utils._pytree.tree_leaves(graph.graph.output_node().args)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_make_up_the_network_and_hand_on_their_ends_alone(name):
    model, inputs, wanted = NETWORKS[name]
    graph = calibrated(model, inputs)
    layers = quantized_layers(graph)
    with torch.no_grad():
        floats, integers = (values_of(graph, inputs, integers=i) for i in (False, True))
    same = [n for n, x in floats.items() if isinstance(x, torch.Tensor) and torch.equal(x, integers[n])]
    for together, sizes in wanted.items():
        found = blocks(graph, layers, together)
        assert [len(block.layers) for block in found if block.layers] == sizes
        assert [node for block in found for node in block.nodes] == list(graph.graph.nodes)[:-1]
        assert [node for block in found for node in block.layers] == list(layers)
        for block, _ in (pair for pair in pairwise(found) if pair[1].layers):
            assert sum(any(user.op != "output" for user in end.users) for end in block.ends) == 1
        for i, whole in ((False, floats), (True, integers)):
            with torch.no_grad():
                ours = block_after_block(graph, found, inputs, i, same)
            assert all(torch.equal(x, whole[leaf]) for x, leaf in zip(ours, returned_by(graph), strict=True))
