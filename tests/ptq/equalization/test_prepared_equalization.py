"""Equalization of a prepared graph: the float function stays, and the integer network errs less where bits are few."""

import math

import pytest
import torch
from calibrated import calibrated, sqnr
from torch import nn

import quantflow as qf
from quantflow.ptq import reconstruct_weights
from quantflow.ptq.equalization import prepared_equalization
from quantflow.ptq.equalization.prepared_equalization import equalize_prepared
from quantflow.simulation.float_network import float_network
from quantflow.simulation.network import outputs
from quantizers import W4A8, Scheme, TensorScheme, XNNPACKQuantizer

IMAGE, LINE = torch.randn(512, 3, 9, 9), torch.randn(2048, 16)
PER_TENSOR = Scheme(weight=TensorScheme(bits=4, symmetric=True))
NETWORKS = {
    "relu": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), IMAGE),
    "relu6": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 8, 3)), IMAGE),
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2)), IMAGE),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1)),
        IMAGE,
    ),
    "pool, flatten, linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(64, 8)),
        IMAGE,
    ),
    "mean, linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)),
        IMAGE,
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), LINE),
}


def unequal(make):
    """A network whose last layer weighs its inputs very unequally."""
    torch.manual_seed(0)
    model = make()
    last = model[-1].weight
    size = torch.exp(-2 * torch.rand(last.shape[1]) ** 2 * 3)
    with torch.no_grad():
        last.mul_(size.reshape(1, -1, *[1] * (last.ndim - 2)))
    return model


def prepared(name, scheme=W4A8):
    """A calibrated graph, and batches to fit and to score on."""
    make, x = NETWORKS[name]
    seen, unseen = x.chunk(2)
    return calibrated(unequal(make), (x[:2],), [seen], XNNPACKQuantizer(scheme)), [(p,) for p in seen.split(64)], unseen


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_function_stays_and_recovered_weights_err_less(name):
    graph, batches, unseen = prepared(name)
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    equal = equalize_prepared(graph, batches)
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items()), "the graph was to be left as it was"
    (theirs,), (ours,) = (outputs(g, [(unseen,)], integers=False)[0] for g in (graph, equal))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    alone, after = (reconstruct_weights(g, batches, progress=False) for g in (graph, equal))
    assert sqnr(after, [(unseen,)]) > sqnr(alone, [(unseen,)]) + 0.3


@pytest.mark.parametrize("name", ["relu", "relu6", "linear"])
def test_recovery_equalizes_and_the_teacher_is_the_network_as_it_was(name):
    graph, batches, unseen = prepared(name)
    recovered = qf.recover(graph, [x for (x,) in batches], progress=False)
    assert [step.kept for step in recovered.steps if step.name == "equalization"] == [True]
    assert torch.equal(float_network(recovered.graph)(unseen), float_network(graph)(unseen))


def test_eight_bits_and_alike_channels_stay():
    make, x = NETWORKS["relu"]
    torch.manual_seed(0)
    assert equalize_prepared(calibrated(make(), (x,), [x]), [(x,)]) is None


def test_a_second_equalization_finds_nothing_to_do():
    graph, batches, _ = prepared("relu")
    assert equalize_prepared(equalize_prepared(graph, batches), batches) is None
    assert equalize_prepared(reconstruct_weights(graph, batches, progress=False), batches) is None


def test_a_channel_that_reaches_the_limit_of_a_clamp_is_not_scaled():
    make, x = NETWORKS["relu6"]
    model = unequal(make)
    with torch.no_grad():
        model[0].bias[:4] += 6.0
    graph = calibrated(model, (x,), [x], XNNPACKQuantizer(W4A8))
    equal = equalize_prepared(graph, [(x,)])
    weight, scaled = (dict(g.named_parameters())["0.weight"] for g in (graph, equal))
    moved = (weight != scaled).flatten(1).any(1)
    assert not moved[:4].any()
    assert moved[4:].any()


def test_rows_of_a_weight_with_one_scale_stay():
    """Scaled rows of the first layer would cost it levels."""
    graph, batches, _ = prepared("relu", PER_TENSOR)
    assert equalize_prepared(graph, batches) is None


@pytest.mark.parametrize("name", ["relu", "groups", "linear"])
def test_the_predicted_noise_is_the_measured_one(name, monkeypatch):
    seen = []
    monkeypatch.setattr(prepared_equalization, "_factors", lambda group, noises: seen.append(noises))
    first_in_float = {"0": None}
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    graph = calibrated(make(), (x[:2],), [x], XNNPACKQuantizer(W4A8, overrides=first_in_float))
    batches = [(part,) for part in x.split(64)]
    assert equalize_prepared(graph, batches) is None
    ((noise,),) = seen
    predicted = -10 * math.log10(noise(torch.ones_like(noise.channels.low)))
    assert predicted == pytest.approx(sqnr(reconstruct_weights(graph, batches, progress=False), batches), abs=2)
