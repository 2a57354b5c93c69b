"""The float and the integer network run side by side; later layers see as many batches as memory holds."""

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.observers.observation import qparams_of
from quantflow.ptq.writing import add_to_bias, write_weight
from quantflow.simulation.network import live_bytes
from quantflow.simulation.paired_interpreter import run_paired
from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import XNNPACKQuantizer


class Narrowing(nn.Module):
    """Values become smaller, then larger, then smaller again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 8, 3, stride=4)
        self.wide, self.head = nn.Conv2d(8, 32, 1), nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


def prepared():
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 16, 16) for _ in range(6)]
    graph = qf.export(Narrowing().eval(), (data[0],), dynamic_batch=True).module()
    return qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False), [(x,) for x in data]


def stops(graph, sample, memory):
    """At each layer, the values of the networks on each batch: inputs, outputs, weight."""
    found = []
    for pair in run_paired(graph, sample, quantized_layers(graph), title="", progress=False, memory=memory):
        layer = pair.layer
        found.append(
            [
                (floats[layer.node].clone(), integers[layer.source].clone(), integers[layer.weight].clone())
                for floats, integers in zip(pair.floats, pair.integers, strict=True)
            ]
        )
        weight = layer.matrices(graph.get_parameter(str(layer.weight.args[0].target)).detach())
        write_weight(graph, layer, weight * 1.01, qparams_of(layer.observer))
        add_to_bias(graph, layer, torch.full((layer.groups, 1, weight.shape[1]), 0.01))
    return found


def test_later_layers_see_more_batches_with_the_same_values():
    graph, sample = prepared()
    largest = max(live_bytes(graph, sample[0]).values())
    few = stops(graph, sample, 2 * 2 * largest)
    graph, sample = prepared()
    all_of_them = stops(graph, sample, 2 * 100 * largest)
    counts = [len(batches) for batches in few]
    assert counts[0] == 2
    assert counts == sorted(counts)
    assert counts[-1] > 2
    assert [len(batches) for batches in all_of_them] == [6] * 4
    for ours, theirs in zip(few, all_of_them, strict=True):
        for found, wanted in zip(ours, theirs, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_the_fewest_batches_begin_whatever_the_memory(count):
    graph, sample = prepared()
    assert [len(batches) for batches in stops(graph, sample[:count], 1)] == [count] * 4
