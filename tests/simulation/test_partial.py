"""Partial networks are float and integers at the ends, and the layers between are charged with what they read."""

import torch
from networks import ConvNet, randomize_statistics, sqnr

import quantflow as qf
from quantflow.analysis.layers import layers_of, observers_in
from quantflow.simulation.partial import PartialNetwork
from quantizers import XNNPACKQuantizer


def test_partial_networks_are_float_and_integers_at_the_ends():
    model, x = randomize_statistics(ConvNet()).eval(), torch.randn(4, 3, 16, 16)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    every = frozenset(observers_in(prepared))
    none, whole = PartialNetwork(prepared, [x], ()), PartialNetwork(prepared, [x], every)
    with torch.no_grad():
        torch.testing.assert_close(none.returned[0], model(x), rtol=1e-4, atol=1e-5)
        assert sqnr(qf.convert(prepared)(x), whole.returned[0]) > 50  # biases are whole numbers there
    for layer in layers_of(prepared):
        for network, active in ((none, layer.observers), (whole, every - layer.observers)):
            again = PartialNetwork(prepared, [x], active).returned
            assert torch.equal(network.outputs(active)[0], again[0])
