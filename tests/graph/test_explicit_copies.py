"""Copies hold what was copied, whatever is written later: three calls in a row are eager's, in core ATen and on the runtime."""

import copy

import pytest
import torch
from torch import nn

import quantflow as qf

X = torch.randn(2, 4)


def input_in_state(net, x):
    net.kept.copy_(x)
    x.add_(net.kept)
    return net.kept, x


def swap(net, x):
    kept = net.kept.clone()
    net.kept.copy_(x)
    x.copy_(kept)
    return net.kept, net.linear(x)


def views(net, x):
    net.kept.view(4, 2).copy_(x.view(4, 2))
    x.view(4, 2).add_(1)
    return net.kept, x


def state_in_state(net, x):
    net.other.copy_(net.kept)
    net.kept.copy_(x)
    return net.other, net.kept * 1


def expanded(net, x):
    net.kept.copy_(x.mean())
    return net.kept


def row(net, x):
    net.kept.copy_(x[1])
    x.mul_(2)
    return net.kept, x


def converted(net, x):
    net.kept.copy_(x.double())
    return net.kept


def own_memory(net, x):
    before = x.to(torch.float32, copy=True)
    x.mul_(2)
    return before


def parts_of_a_new_tensor(net, x):
    mixed = torch.empty_like(x)
    mixed[:, ::2], mixed[:, 1::2] = x[:, 2:], net.linear(x)[:, :2]
    return mixed


def written_and_returned(net, x):
    return net.linear(x.sigmoid_()), x


STEPS = (
    *(input_in_state, swap, views, state_in_state, expanded, row, converted, own_memory),
    *(parts_of_a_new_tensor, written_and_returned),
)


class Net(nn.Module):
    """Two buffers and ``step``, which copies."""

    def __init__(self, step):
        super().__init__()
        self.step, self.linear = step, nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(2, 4))
        self.register_buffer("other", torch.zeros(2, 4))

    def forward(self, x):
        return self.step(self, x)


def called(network):
    """What ``network`` returns in three calls, and what it leaves of its inputs."""
    found = []
    with torch.no_grad():
        for i in range(3):
            x = X + i
            outputs = network(x)
            found += [t.clone() for t in (*(outputs if isinstance(outputs, (tuple, list)) else [outputs]), x)]
    return found


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_copies(step):
    """Without a warning, so that what is written lowers the fast way too."""
    model = Net(step).eval()
    core = qf.export(copy.deepcopy(model), (X.clone(),)).to_core_aten()
    decomposed, program = core.module(), core.to_edge("xnnpack").to_executorch()
    expected = called(model)
    torch.testing.assert_close(called(decomposed), expected)
    torch.testing.assert_close(called(program), expected)


def test_portable_kernels():
    model = Net(swap).eval()
    program = qf.export(copy.deepcopy(model), (X.clone(),)).to_core_aten().to_edge().to_executorch()
    torch.testing.assert_close(called(program), called(model))
