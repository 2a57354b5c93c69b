"""Branches that lead nowhere: what was to observe them does not stay behind."""

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantflow.observers.observation import observers_of
from quantizers import DYNAMIC_INT8, INT8, XNNPACKQuantizer

ENDS = {
    "linear": nn.Identity(),
    "batch norm": nn.BatchNorm1d(8),
    "dropout": nn.Dropout(0.5),
    "in place": nn.ReLU(inplace=True),
}


class DeadBranch(nn.Module):
    """A layer, what follows it, and a sum that nothing reads."""

    def __init__(self, end):
        super().__init__()
        self.used, self.unused, self.end = nn.Linear(8, 8), nn.Linear(8, 8), ENDS[end]

    def forward(self, x):
        hidden = self.used(x)
        nowhere = self.end(self.unused(hidden))
        nowhere = nowhere + hidden
        return self.used(hidden)


def called(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}


@pytest.mark.parametrize("end", ENDS)
def test_quantize_leaves_the_branch_out(end):
    model, x = DeadBranch(end).eval(), torch.randn(16, 8)
    result = qf.quantize(model, (x,), [x], progress=False)
    assert sqnr(result.graph(x).detach(), result.program(x)) > 35
    assert sqnr(model(x).detach(), result.program(x)) > 25


@pytest.mark.parametrize("scheme", [INT8, DYNAMIC_INT8], ids=str)
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("end", ENDS)
def test_every_observer_is_called(end, qat, scheme):
    graph = qf.export(DeadBranch(end), (torch.randn(16, 8),)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(scheme), qat=qat)
    assert set(observers_of(prepared)) == called(prepared)
    assert {name for name, _ in prepared.named_modules() if name.count(".") == 1 and "quantization" in name} == called(
        prepared
    )


def test_a_plan_has_no_branch_that_leads_nowhere():
    graph = qf.export(DeadBranch("linear"), (torch.randn(16, 8),)).module()
    assert "unused" not in str(XNNPACKQuantizer().plan(graph))


def test_a_graph_of_stock_torchao_whose_dead_branch_was_erased():
    model, x = DeadBranch("linear").eval(), torch.randn(16, 8)
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), XNNPACKQuantizer())
    prepared.graph.eliminate_dead_code()
    prepared.recompile()
    qf.calibrate(prepared, [x], progress=False)
    qf.sensitivity(prepared, [x], progress=False)
    converted = qf.convert(qf.recover(prepared, [x], progress=False).graph)
    assert sqnr(model(x).detach(), converted(x).detach()) > 25


@pytest.mark.parametrize("qat", [False, True], ids=["captured", "prepared"])
def test_what_draws_or_moves_statistics_in_training_stays(qat):
    """A batch norm that is called once for the output and once for nothing; a dropout that draws for nothing."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x):
            y = self.norm(self.linear(x))
            self.drop(self.norm(self.linear(y)) * 2)
            return self.drop(y)

    model, x = Shared(), torch.randn(16, 8)
    graph = qf.export(model, (x,)).module()
    if qat:
        graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
        for module in graph.modules():
            if isinstance(module, qf.FakeQuantize):
                module.enable_fake_quant(False)
    found = []
    for network in (model.train(), graph.train()):
        torch.manual_seed(0)
        outputs = [network(x), network(x)]
        found.append([*outputs, torch.get_rng_state(), network.norm.running_mean, network.norm.running_var])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
