"""A prepared graph as a network says what eager and what the converted graph say."""

import torch
from calibrated import calibrated
from networks import ConvNet, randomize_statistics

import quantflow as qf
from quantflow.simulation.network import outputs


def test_the_walk_says_what_eager_and_what_the_converted_graph_say():
    x = torch.randn(6, 3, 16, 16)
    model = ConvNet()
    randomize_statistics(model)
    graph = calibrated(model, (x[:1],), [x])
    with torch.no_grad():
        (floats,) = outputs(graph, [(x,)], integers=False)
        (integers,) = outputs(graph, [(x,)], integers=True)
        torch.testing.assert_close(floats[0], model.eval()(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(integers[0], qf.convert(graph)(x), rtol=1e-5, atol=1e-6)
