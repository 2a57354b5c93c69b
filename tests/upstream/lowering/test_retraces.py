import torch
from executorch import exir
from executorch.exir import pass_base
from torch import nn
from torch._export import pass_base as torch_pass_base

from quantflow.upstream.lowering.retraces import copied_retraces
from quantflow.upstream.replaced import exclusively


def edge_graph():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Hardswish())
    edge = exir.to_edge(torch.export.export(model.eval(), (torch.zeros(1, 1, 8, 8),)))
    return edge.exported_program().graph_module


def described(module):
    def shape(val):
        return tuple(val.shape) if isinstance(val, torch.Tensor) else tuple(map(shape, val or ()))

    return [(n.name, n.op, str(n.target), str(n.args), shape(n.meta.get("val"))) for n in module.graph.nodes]


def test_a_copy_is_what_a_retrace_makes():
    module = edge_graph()
    stock = pass_base.ExportPass()(module).graph_module
    with exclusively(), copied_retraces():
        copied = pass_base.ExportPass()(module).graph_module
    assert described(copied) == described(stock)
    assert copied.meta.keys() == stock.meta.keys()


def test_a_pass_with_hooks_of_its_own_is_retraced():
    class Renamed(pass_base.ExportPass):
        def placeholder(self, name, arg, meta):
            return super().placeholder(f"{name}_own", arg, meta)

    with exclusively(), copied_retraces():
        again = Renamed()(edge_graph()).graph_module
    assert all("_own" in n.name for n in again.graph.find_nodes(op="placeholder"))


def test_the_names_are_replaced_and_come_back():
    bases = pass_base._ExportPassBase, torch_pass_base._ExportPassBaseDeprecatedDoNotUse
    before = [base.call for base in bases]
    assert issubclass(pass_base.ExportPass, bases[0])
    with exclusively(), copied_retraces():
        assert all(base.call is not stock for base, stock in zip(bases, before, strict=True))
    assert [base.call for base in bases] == before


def test_a_graph_names_its_nodes_by_a_target():
    assert torch.fx.Graph()._target_to_str("add") == "add"
