"""Recovery works on batches of other examples than the data's: networks in which these act on each other are told apart."""

import pytest
import torch
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


class OverTheBatch(nn.Module):
    """A sum over the examples before the last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).cumsum(0))


class Transposed(nn.Module):
    """The examples lie along the second dimension of the output."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x))).transpose(0, 1)


class Merged(nn.Module):
    """The examples lie behind the steps, merged with them, as behind a network that has time first."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(1, 3)

    def forward(self, x):
        return self.last(x.t().flatten()[:, None])


@pytest.mark.parametrize(("model", "apart"), [(OverTheBatch(), False), (Transposed(), True), (Merged(), True)])
@pytest.mark.filterwarnings("ignore:.plan.")  # of the sum, which runs in float between integers
def test_networks_in_which_examples_act_on_each_other_stay_as_calibrated(model, apart):
    data = [torch.randn(2, 4) for _ in range(16)]
    graph = qf.export(model.eval(), (data[0],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False)
    steps = qf.recover(prepared, data, progress=False).steps
    assert ("act on each other" in steps[0].name) is not apart
    assert len(steps) == (3 if apart else 1)


class OverTheRows(nn.Module):
    """What is left of each example without the mean over all."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@pytest.mark.filterwarnings("ignore:.plan.")  # of the mean, which runs in float between integers
def test_the_batch_with_the_most_examples_tells_whether_they_act_on_each_other():
    batch, length = torch.export.Dim("batch", min=1, max=16), torch.export.Dim("length", min=2, max=64)
    model = nn.Sequential(nn.Linear(8, 8), OverTheRows()).eval()
    graph = qf.export(model, (torch.randn(4, 5, 8),), dynamic_shapes={"input": {0: batch, 1: length}}).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    data = [*(torch.randn(1, n, 8) for n in range(3, 8)), torch.randn(8, 30, 8)]
    qf.calibrate(prepared, data, progress=False)
    assert "act on each other" in qf.recover(prepared, data, progress=False).steps[0].name
