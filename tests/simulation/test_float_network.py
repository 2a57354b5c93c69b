"""The float network of a prepared graph is the network that was prepared."""

import pytest
import torch
from networks import norm_networks, randomize_statistics

import quantflow as qf
from quantflow.observers.observation import observers_of
from quantflow.simulation.float_network import float_network
from quantizers import W4A8, Scheme, TensorScheme, XNNPACKQuantizer

PER_TENSOR = Scheme(weight=TensorScheme(symmetric=True))


@pytest.mark.parametrize("scheme", [W4A8, PER_TENSOR], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("name", ["conv_bn", "residual", "shared_conv_two_norms", "linear_bn", "convnet"])
def test_the_float_network_is_the_network_that_was_prepared(name, qat, scheme):
    torch.manual_seed(0)
    model, x = norm_networks()[name]
    randomize_statistics(model)
    data = [torch.randn_like(x) for _ in range(2)]
    graph = qf.prepare(qf.export(model.eval(), (x,)).module(), XNNPACKQuantizer(scheme), qat=qat)
    graph = qf.recover(qf.calibrate(graph, data, progress=False), data, progress=False).graph
    state = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    network, expected = float_network(graph), model(x)
    assert (network(x) - expected).norm() < 1e-4 * expected.norm()
    assert not observers_of(network)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in graph.state_dict().items())
