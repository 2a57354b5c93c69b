"""Operators over volumes as operators over images: the same function, gradients and statistics, and integers on the runtime."""

import copy

import pytest
import torch
from networks import randomize_statistics, sqnr
from torch import nn

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.rewrites import VOLUME_REWRITES, rewrite
from quantizers import XNNPACKQuantizer

VOLUME = torch.randn(2, 4, 6, 8, 7)


class Residual(nn.Module):
    """As in R3D: a strided block, a skip of its own, and a global pool."""

    def __init__(self):
        super().__init__()
        self.first, self.first_bn = nn.Conv3d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm3d(6)
        self.second, self.second_bn = nn.Conv3d(6, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6)
        self.skip, self.skip_bn = nn.Conv3d(4, 6, 1, stride=2), nn.BatchNorm3d(6, eps=1e-2)
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Linear(6, 5)

    def forward(self, x):
        y = self.second_bn(self.second(self.relu(self.first_bn(self.first(x)))))
        y += self.skip_bn(self.skip(x))
        return self.head(self.pool(self.relu(y)).flatten(1))


CASES = {
    "cube": lambda: nn.Conv3d(4, 6, 3, padding=1),
    "single frames": lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)),
    "strided": lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1),
    "strided skip": lambda: nn.Conv3d(4, 6, 1, stride=2),
    "stride beyond the kernel": lambda: nn.Conv3d(4, 6, (2, 3, 3), stride=(4, 1, 1), padding=(1, 0, 0)),
    "dilated": lambda: nn.Conv3d(4, 6, 2, dilation=3, stride=2, padding=3),
    "groups": lambda: nn.Conv3d(4, 6, 3, groups=2, stride=(2, 1, 1), padding=1),
    "depthwise over time": lambda: nn.Conv3d(4, 8, (3, 1, 1), groups=4, padding=(1, 0, 0)),
    "same padding": lambda: nn.Conv3d(4, 6, (2, 3, 4), padding="same"),
    "batch norm and clamps": lambda: nn.Sequential(
        nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU6(inplace=True), nn.Conv3d(6, 4, (3, 1, 1)), nn.Hardtanh()
    ),
    "max pool": lambda: nn.Sequential(nn.Conv3d(4, 6, 1), nn.MaxPool3d(3, 2, 1)),
    "max pool of frames": lambda: nn.Sequential(nn.Conv3d(4, 6, 1), nn.MaxPool3d((1, 3, 3), 2, ceil_mode=True)),
    "average pool": lambda: nn.Sequential(nn.Conv3d(4, 6, 1), nn.AvgPool3d(3, 2, 1)),
    "average without the padding": lambda: nn.Sequential(
        nn.Conv3d(4, 6, 1), nn.AvgPool3d(3, 1, 1, count_include_pad=False)
    ),
    "residual": Residual,
}


def like(parameter, reference):
    """A gradient of a weight over images in the form of the weight over volumes."""
    if parameter.shape == reference.shape:
        return parameter
    outputs, channels, depth, *rest = reference.shape
    return parameter.reshape(outputs, depth, channels, *rest).transpose(1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_function_gradients_and_statistics_stay(case, dynamic):
    model = randomize_statistics(CASES[case]())
    graph = qf.export(model, (VOLUME,), dynamic_batch=dynamic).module()
    rewritten = rewrite(copy.deepcopy(graph), VOLUME_REWRITES)
    x = torch.randn(5, 4, 6, 8, 7) if dynamic else VOLUME
    model.eval()
    assert torch.allclose(model(x), rewritten.eval()(x), rtol=1e-5, atol=1e-5)
    for network in (model, rewritten):
        network.train()(x).square().sum().backward()
    gradients = dict(rewritten.named_parameters())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    largest = max(
        float(p.grad.abs().max()) for p in model.parameters()
    )  # a bias before batch norm has none, but rounding
    for name, parameter in model.named_parameters():
        ours = like(gradients[name].grad, parameter)
        assert torch.allclose(ours, parameter.grad, rtol=1e-3, atol=1e-5 * largest), name
    buffers = dict(rewritten.named_buffers())
    for name, statistic in model.named_buffers():
        assert torch.allclose(buffers[name], statistic, rtol=1e-4, atol=1e-5), name
    assert rewrite(copy.deepcopy(rewritten), VOLUME_REWRITES).code == rewritten.code
    assert model.state_dict().keys() == rewritten.state_dict().keys()


@pytest.mark.parametrize("case", CASES)
def test_no_third_dimension_is_left(case):
    graph = rewrite(qf.export(CASES[case](), (VOLUME,)).module(), VOLUME_REWRITES)
    assert not any("3d" in str(op(n)) for n in graph.graph.nodes)


def test_the_plan_leaves_the_weights_as_they_were():
    graph = qf.export(CASES["cube"](), (VOLUME,)).module()
    assert "int8" in str(XNNPACKQuantizer().plan(graph))
    assert graph.get_parameter("weight").ndim == 5
    graph(VOLUME)


def test_frozen_weights_stay_frozen():
    model = CASES["cube"]().requires_grad_(False)
    graph = rewrite(qf.export(model, (VOLUME,)).module(), VOLUME_REWRITES)
    assert not any(p.requires_grad for p in graph.parameters())


def test_a_shared_weight_is_refused_by_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 1)

        def forward(self, x):
            return self.last(self.conv(self.conv(x)))

    plan = XNNPACKQuantizer().plan(qf.export(Shared(), (VOLUME,)).module())
    refused = [d for d in plan.floating if "images can't stand for this" in d.reason]
    assert len(refused) == 2
    assert any(d.node.name == "conv2d_default" for d in plan.integer)


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_a_video_network_runs_in_integers(qat):
    model = randomize_statistics(Residual()).eval()
    graph = qf.export(model, (VOLUME,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
    qf.calibrate(prepared, [VOLUME], progress=False)
    reference = model
    if qat:
        batch = (VOLUME, torch.tensor([0, 1]))
        reference = qf.train(prepared, [batch] * 3, epochs=1, lr=1e-2, progress=False) and prepared.eval()
    converted = qf.convert(prepared)
    program = qf.export(converted, (VOLUME,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert (program.delegation.fraction, program.delegation.calls) == (1.0, 1)
    inside = program.delegation.floating
    assert not any("conv" in name or "batch_norm" in name for name in inside), inside
    assert sqnr(converted(VOLUME).detach(), program(VOLUME)) > 35
    assert sqnr(reference(VOLUME).detach(), program(VOLUME)) > 20


def test_the_float_path_may_use_them_too():
    model = randomize_statistics(CASES["batch norm and clamps"]()).eval()
    graph = rewrite(qf.export(model, (VOLUME,)).module(), VOLUME_REWRITES)
    program = qf.export(graph, (VOLUME,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert program.delegation.fraction == 1.0
    assert torch.allclose(program(VOLUME), model(VOLUME), atol=1e-4)
