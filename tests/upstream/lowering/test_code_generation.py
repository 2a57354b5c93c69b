import torch
from torch import fx, nn

from quantflow.upstream.lowering.code_generation import code_when_called
from quantflow.upstream.replaced import exclusively


def edited():
    module = torch.export.export(nn.ReLU(), (torch.zeros(1),)).module()
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        node.target = torch.ops.aten.neg.default
    module.recompile()
    return module


def test_the_code_is_the_same_when_read_called_or_at_the_end():
    stock = edited().code
    with exclusively(), code_when_called():
        read, called, left = edited(), edited(), edited()
        assert read.code == stock
        assert called(torch.ones(1)) == -1
    assert called.code == left.code == stock
    assert left(torch.ones(1)) == -1


def test_recompile_returns_the_code():
    with exclusively(), code_when_called():
        module = edited()
        assert "neg" in module.recompile().src


def test_a_graph_module_has_the_names():
    module = torch.export.export(nn.ReLU(), (torch.zeros(1),)).module()
    assert module._in_spec == module.graph._codegen.pytree_info.in_spec
    assert module._out_spec == module.graph._codegen.pytree_info.out_spec
    assert module._graph is module.graph
    assert isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen)
    assert callable(module._recompile_submodules)
    assert isinstance(fx.GraphModule.code, property)


def test_nothing_stays_replaced():
    before = fx.GraphModule.recompile, fx.GraphModule.code, fx.GraphModule.__str__
    with exclusively(), code_when_called():
        assert fx.GraphModule.recompile is not before[0]
    assert (fx.GraphModule.recompile, fx.GraphModule.code, fx.GraphModule.__str__) == before
