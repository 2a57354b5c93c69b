"""Bias correction: a planted shift is gone, from data and from batch norm alone; nothing but biases moves."""

import pickle

import pytest
import torch
from networks import ConvNet, randomize_statistics
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.ptq import correct_bias
from quantflow.ptq.bias_correction.clipped_normal import clipped_normal
from quantflow.simulation.float_weights import with_float_weights
from quantflow.simulation.network import outputs
from quantizers import W4A8, XNNPACKQuantizer


def calibrated(model, data, scheme=W4A8):
    graph = qf.export(model.eval(), (data[:2],), dynamic_batch=True).module()
    return qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(scheme)), [data], progress=False)


def mean_error(graph, x, floats):
    """Of each output channel, from what the graph ``floats`` says in float."""
    with torch.no_grad():
        ((reference,),) = outputs(floats, [(x,)], integers=False)
        ((found,),) = outputs(graph, [(x,)], integers=True)
    return (reference - found).transpose(0, 1).flatten(1).mean(1).abs()


def off_grid(layer):
    """Every weight 0.4 of a step above a point of its 4-bit grid: each rounds down."""
    with torch.no_grad():
        integers = torch.randint(-6, 6, layer.weight.shape) + 0.4
        integers.flatten(1)[:, 0] = 7.5  # the range of 15 steps ends half a step above the greatest integer
        layer.weight.copy_(integers / 7.5)
    return layer


PLANTED = {
    "linear": (lambda: nn.Linear(16, 4), torch.rand(256, 16) + 1),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), torch.rand(64, 4, 6, 6) + 1),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), torch.rand(64, 4, 6, 6) + 1),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_shift_is_removed(name):
    make, x = PLANTED[name]
    graph = calibrated(off_grid(make()), x)
    before = mean_error(graph, x, graph)
    corrected = correct_bias(graph, [x], progress=False)
    assert before.min() > 0.1
    assert (mean_error(corrected, x, graph) < 0.03 * before).all()
    for key, tensor in graph.state_dict().items():
        assert "bias" in key or torch.equal(tensor, corrected.state_dict()[key])
    with torch.no_grad():
        ((simulated,),) = outputs(corrected, [(x,)], integers=True)
    torch.testing.assert_close(qf.convert(corrected)(x), simulated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0.0, float("inf")), (0.0, 6.0), (-1.0, 2.0), (float("-inf"), 1.0)])
def test_the_clipped_normal_is_what_sampling_says(low, high):
    mean = torch.tensor([0.0, 1.5, -2.0, 7.0, -90.0, 90.0]).double()
    std = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 0.0]).double()
    x = (mean + std * torch.randn(400_000, 6).double()).clamp(low, high)
    found = clipped_normal(mean, std, low, high)
    torch.testing.assert_close(found[0], x.mean(0), rtol=0.01, atol=0.01)
    torch.testing.assert_close(found[1], x.std(0), rtol=0.01, atol=0.01)


class NormedPair(nn.Module):
    """Images, a normed convolution, its activation, and what reads that."""

    def __init__(self, activation, pooled):
        super().__init__()
        self.conv, self.norm, self.activation = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation
        self.next = off_grid(nn.Linear(8, 6) if pooled else nn.Conv2d(8, 6, 3))
        self.pooled = pooled

    def forward(self, x):
        x = self.activation(self.norm(self.conv(x)))
        return self.next(x.mean((2, 3)) if self.pooled else x)


@pytest.mark.parametrize("pooled", [False, True], ids=["conv", "pool, linear"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity()], ids=lambda a: type(a).__name__)
def test_batch_norm_alone_tells_the_shift(activation, pooled):
    model, x = NormedPair(activation, pooled), torch.randn(256, 3, 8, 8)
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 4)
        model.norm.bias.uniform_(-1, 3)
        for _ in range(60):  # statistics of the data
            model.train()(x)
    graph = calibrated(model, x)
    with pytest.warns(qf.QuantflowWarning, match="conv"):  # nothing is known of the image
        corrected = correct_bias(graph)
    before, after = mean_error(graph, x, graph), mean_error(corrected, x, graph)
    assert (after < 0.2 * before.max()).all()
    assert after.mean() < 0.15 * before.mean()


@pytest.mark.filterwarnings("ignore:.*stem")  # nothing is known of the image
@pytest.mark.parametrize("data", [True, False], ids=["data", "batch norm"])
def test_what_is_corrected_is_corrected_once(data):
    model, x = randomize_statistics(ConvNet()), torch.randn(32, 3, 16, 16)
    graph, given = calibrated(model, x), [x] if data else None
    once = correct_bias(graph, given, progress=False)
    twice = correct_bias(pickle.loads(pickle.dumps(once)), given, progress=False)
    for key, tensor in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    before = with_float_weights(twice)
    assert all(torch.equal(before.state_dict()[k], v) for k, v in graph.state_dict().items())


def test_the_norms_are_remembered_through_pickle():
    model, x = randomize_statistics(ConvNet()), torch.randn(8, 3, 16, 16)
    graph = calibrated(model, x)
    with pytest.warns(qf.QuantflowWarning, match="stem"):
        expected = correct_bias(graph).state_dict()
    with pytest.warns(qf.QuantflowWarning, match="stem"):
        found = correct_bias(pickle.loads(pickle.dumps(graph))).state_dict()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_correction_takes_a_graph_that_stock_torchao_prepared():
    model, x = randomize_statistics(ConvNet()), torch.randn(8, 3, 16, 16)
    prepared = prepare_pt2e(torch.export.export(model.eval(), (x,)).module(), XNNPACKQuantizer(W4A8))
    qf.calibrate(prepared, [x], progress=False)
    before = mean_error(prepared, x, prepared)
    assert mean_error(correct_bias(prepared, [x], progress=False), x, prepared).mean() < before.mean()


def test_bad_input_names_stage_and_remedy():
    x = torch.randn(8, 4)
    graph = qf.export(nn.Linear(4, 4), (x,), dynamic_batch=True).module()
    ready = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    for bad, data, words in (
        (graph, [x], "not prepared"),
        (qf.prepare(graph, XNNPACKQuantizer()), [x], "not calibrated"),
        (qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], "training"),
        (ready, [], "no data"),
        (ready, [torch.randn(8, 5)], "shape"),
        (ready, None, "no batch norm"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            correct_bias(bad, data, progress=False)
        assert raised.value.stage == "correct_bias"
        assert raised.value.remedy
