"""Weight reconstruction lowers the error of each layer, and dead features are no trouble."""

import torch
from calibrated import calibrated, sqnr
from torch import nn

import quantflow as qf
from quantflow.ptq import reconstruct_weights
from quantflow.ptq.weight_reconstruction.gptq import GPTQ, damped
from quantflow.ptq.weight_reconstruction.least_squares import correction
from quantflow.ptq.weight_reconstruction.moments import Moments
from quantflow.simulation.network import outputs
from quantizers import W4A8, XNNPACKQuantizer


def test_compensation_removes_the_mean_error_and_lowers_the_error_of_a_layer():
    torch.manual_seed(1)
    x = torch.randn(512, 16) @ torch.randn(16, 16) + 2
    graph = calibrated(nn.Linear(16, 8), (x[:8],), [x], XNNPACKQuantizer(W4A8))
    batches = [(part,) for part in x.split(64)]
    found = reconstruct_weights(graph, batches, progress=False)
    with torch.no_grad():
        reference = torch.cat([o[0] for o in outputs(graph, batches, integers=False)])
        before, after = (torch.cat([o[0] for o in outputs(g, batches, integers=True)]) for g in (graph, found))
    # The output's own rounding is the observer's after the layer; the mean is right to a part of its step.
    assert (after - reference).mean(0).abs().max() < 0.2 * (before - reference).mean(0).abs().max()
    assert sqnr(found, batches) > sqnr(graph, batches) + 3
    converted = qf.convert(found)
    assert torch.allclose(converted(x), after, atol=1e-4)


def test_a_dead_feature_and_a_dead_group_are_no_trouble():
    x = torch.zeros(2, 50, 4)
    x[0, :, 1:] = torch.randn(50, 3)
    r = torch.randn(2, 50, 3)
    weights = torch.ones(2, 50)
    weights[1] = 0
    halves = [Moments.of(x[:, s], r[:, s], weights[:, s], x[:, :1]) for s in (slice(0, 25), slice(25, 50))]
    assert correction(*halves).isfinite().all()
    weight = torch.randn(2, 3, 4).double()
    step = torch.full((2, 3, 1), 0.1).double()
    covariance = sum(halves[1:], halves[0]).covariance
    rounded = GPTQ(covariance, damped(covariance)).round(weight, step, torch.zeros_like(step), -127, 127)
    assert rounded.isfinite().all()
    torch.testing.assert_close(rounded[1], (weight[1] / 0.1).round() * 0.1)
