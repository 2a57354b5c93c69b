"""Convolutions and linear layers over images as linear layers over rows: the same function, with a dynamic form."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.rewrites import PATCH_PRODUCT_REWRITES, rewrite
from quantizers import DYNAMIC_INT8, DYNAMIC_W4, INT8, XNNPACKQuantizer

LINEAR = torch.ops.aten.linear.default


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.booleans(),
)
def test_any_convolution_stays_the_same_function(kernel, stride, padding, dilation, lines, biased):
    taken = [given[1:] if lines else given for given in (kernel, stride, padding, dilation)]
    layer = (nn.Conv1d if lines else nn.Conv2d)(3, 5, *taken[:3], dilation=taken[3], bias=biased).eval()
    x = torch.randn(2, 3, *((11,) if lines else (9, 11)))
    graph = qf.export(layer, (x[:1],), dynamic_batch=True).module()
    rewritten = rewrite(copy.deepcopy(graph), PATCH_PRODUCT_REWRITES)
    assert [op(n) for n in rewritten.graph.nodes].count(LINEAR) == 1
    torch.testing.assert_close(rewritten(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding):
    layer, x = nn.Conv2d(3, 4, (4, 3), padding=padding), torch.randn(2, 3, 8, 8)
    rewritten = rewrite(qf.export(layer, (x,)).module(), PATCH_PRODUCT_REWRITES)
    assert LINEAR in map(op, rewritten.graph.nodes)
    torch.testing.assert_close(rewritten(x), layer(x), rtol=1e-4, atol=1e-5)


class Shares(nn.Module):
    """Two convolutions, one depthwise and a linear layer read one tensor in channels-last memory."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(8, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32)
        self.wide, self.narrow = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.deep, self.last = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Linear(32, 32)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        rows = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.hardswish(self.wide(x) + self.narrow(x) + self.narrow(self.deep(x))) + rows


class Lines(nn.Module):
    """Convolutions over lines."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 32, 5, stride=2, padding=2), nn.Conv1d(32, 32, 3, dilation=2)

    def forward(self, x):
        return self.second(F.relu(self.first(x.flatten(2))))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [DYNAMIC_INT8, DYNAMIC_W4], ids=str)
@pytest.mark.parametrize("make", [Shares, Lines])
@pytest.mark.filterwarnings("ignore:.*:quantflow.QuantflowWarning")
def test_dynamic_convolutions_on_the_runtime(make, scheme):
    torch.manual_seed(0)
    model, data = make().eval(), [torch.randn(1, 8, 8, 8) for _ in range(4)]
    quantizer, graph = XNNPACKQuantizer(scheme), qf.export(model, (data[0],)).module()
    plan = quantizer.plan(graph)
    converted = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), data, progress=False))
    program = qf.export(converted, (data[0],)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == plan.calls == 1
    with torch.no_grad():
        exact, ours, found = (torch.cat([net(x).clone() for x in data]) for net in (model, converted, program))
    assert sqnr(ours, found) > 60
    assert sqnr(exact, found) > (35 if scheme is DYNAMIC_INT8 else 14)
    layers = {o.layer for o in plan.operators if "dynamic" in o.becomes}
    assert layers >= ({"wide", "narrow", "last"} if make is Shares else {"second"})


def test_only_layers_that_are_asked_for_with_dynamic_activations_are_rewritten():
    model, x = Shares().eval(), torch.randn(1, 8, 8, 8)
    graph = qf.export(model, (x,)).module()
    plan = XNNPACKQuantizer(INT8, overrides={"wide": DYNAMIC_INT8}).plan(graph)
    found = {(o.layer, o.operators) for o in plan.operators}
    assert ("wide", ("linear",)) in found
    assert any(layer == "narrow" and "conv2d" in operators for layer, operators in found)


def test_an_override_by_predicate_holds_for_what_replaces_its_node():
    graph = qf.export(Shares().eval(), (torch.randn(1, 8, 8, 8),)).module()

    def convolutions(node):
        return node.target is torch.ops.aten.conv2d.default

    found = XNNPACKQuantizer(INT8, overrides=[(convolutions, DYNAMIC_INT8)]).plan(graph)
    dynamic = {o.layer for o in found.operators if "dynamic" in o.becomes}
    assert dynamic == {"stem", "wide", "narrow"}

    def linears(node):
        return node.target is LINEAR

    found = XNNPACKQuantizer(DYNAMIC_INT8, overrides=[(linears, None)]).plan(graph)
    assert {o.layer for o in found.operators if "dynamic" in o.becomes} == {"stem", "wide", "narrow"}


def test_what_gains_nothing_stays():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3)  # 27 features make no groups of 32

        def forward(self, x):
            return self.conv(x), F.avg_pool2d(x[:, :1], 3)

    graph = qf.export(Pools().eval(), (torch.randn(1, 3, 9, 9),)).module()
    for scheme, layers in ((DYNAMIC_W4, set()), (DYNAMIC_INT8, {"conv"})):
        operators = XNNPACKQuantizer(scheme).plan(graph).operators
        assert {o.layer for o in operators if "dynamic" in o.becomes} == layers
        assert sum("conv2d" in o.operators for o in operators) == 2 - len(layers)
