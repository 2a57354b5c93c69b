import torch
from torch import fx, nn

from quantflow.upstream.grad_mode import set_grad_enabled


def graph_module():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(set_grad_enabled, (False,))
    y = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.call_function(set_grad_enabled, (True,))
    graph.output((graph.call_function(torch.ops.aten.neg.default, (y,)),))
    return fx.GraphModule(nn.Module(), graph)


def test_it_sets_the_mode():
    set_grad_enabled(False)
    assert not torch.is_grad_enabled()
    set_grad_enabled(True)
    assert torch.is_grad_enabled()


def test_the_code_of_a_graph_can_call_it():
    (y,) = graph_module()(torch.ones(2, requires_grad=True))
    assert not y.requires_grad
    assert torch.is_grad_enabled()


def test_torch_export_knows_it():
    program = torch.export.export(graph_module(), (torch.ones(2),))
    assert torch.ops.higher_order.wrap_with_set_grad_enabled in [node.target for node in program.graph.nodes]
