import torch
from torch import fx, nn

from quantflow.upstream.autocast import enter_autocast, exit_autocast


def graph_module():
    graph = fx.Graph()
    x = graph.placeholder("x")
    mode = graph.call_function(enter_autocast, ("cpu", torch.bfloat16, True, False))
    y = graph.call_function(torch.ops.aten.mm.default, (x, x))
    graph.call_function(exit_autocast, (mode,))
    graph.output((y,))
    return fx.GraphModule(nn.Module(), graph)


def test_enter_and_exit():
    mode = enter_autocast("cpu", torch.bfloat16, True, False)
    assert torch.is_autocast_enabled("cpu")
    exit_autocast(mode)
    assert not torch.is_autocast_enabled("cpu")


def test_the_code_of_a_graph_can_call_them():
    (y,) = graph_module()(torch.ones(2, 2))
    assert y.dtype is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_torch_export_knows_them():
    program = torch.export.export(graph_module(), (torch.ones(2, 2),))
    assert torch.ops.higher_order.wrap_with_autocast in [node.target for node in program.graph.nodes]
