import inspect

import pytest
import torch
from executorch.backends.xnnpack._passes import convert_to_sdpa
from executorch.backends.xnnpack.partition.graphs import sdpa
from torch import fx, nn

from quantflow.upstream.edge_operators import ops
from quantflow.upstream.lowering.attention_patterns import attention_patterns_if_possible
from quantflow.upstream.replaced import exclusively


def graph_of(operator, *args):
    graph = fx.Graph()
    x = graph.placeholder("x")
    given = graph.call_function(operator, (x, *args))
    graph.output(graph.call_function(ops.edge.aten._softmax.default, (given, -1, False)))
    return fx.GraphModule(nn.Module(), graph)


MASKED = graph_of(ops.edge.aten.add.Tensor, torch.zeros(1))
UNMASKED = graph_of(ops.edge.aten.neg.default)


@pytest.mark.parametrize(("module", "traced"), [(MASKED, True), (UNMASKED, False)], ids=["masked", "unmasked"])
def test_patterns_are_traced_only_for_a_softmax_of_a_sum(module, traced, monkeypatch):
    seen = []
    monkeypatch.setattr(convert_to_sdpa.ConvertToSDPAPass, "call", lambda self, m: seen.append(convert_to_sdpa.sdpa))
    with exclusively(), attention_patterns_if_possible():
        convert_to_sdpa.ConvertToSDPAPass.call(None, module)
    assert (seen == [sdpa]) == traced
    assert traced or seen[0].get_graphs() == []
    assert convert_to_sdpa.sdpa is sdpa


def test_the_pass_reads_the_patterns_from_there():
    assert "sdpa.get_graphs()" in inspect.getsource(convert_to_sdpa)


def test_each_pattern_has_a_softmax_of_a_sum():
    softmax, add = ops.edge.aten._softmax.default, ops.edge.aten.add.Tensor
    for pattern in sdpa.get_graphs():
        given = [node.args[0].target for node in pattern.graph.nodes if node.target == softmax]
        assert given == [add]
