"""Networks that write in place, and how three calls of them in a row are compared."""

import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantizers import XNNPACKQuantizer


class Stateful(nn.Module):
    """A linear layer before and one behind ``step``, which reads and writes the buffers."""

    def __init__(self, step, **state):
        super().__init__()
        self.step, self.first, self.last = step, nn.Linear(8, 8), nn.Linear(8, 4)
        for name, buffer in state.items():
            self.register_buffer(name, buffer)

    def forward(self, x):
        return self.last(self.step(self, self.first(x)))


def average(net, x):
    net.ema.mul_(0.9).add_(0.1 * x.mean((0, 1)))
    return x + net.ema


def average_without_gradients(net, x):
    with torch.no_grad():
        net.ema.mul_(0.9).add_(0.1 * x.mean((0, 1)))
    return x + net.ema


def average_read_first(net, x):
    y = x + net.ema
    net.ema.copy_(0.9 * net.ema + 0.1 * x.mean((0, 1)))
    return y


def numbers(net, x):
    net.ema.mul_(0.5).add_(1.0).clamp_(max=1.75)
    return x * net.ema


def several(net, x):
    net.calls.add_(1)
    net.seen.logical_or_(x.mean() > -100)
    net.ema.mul_(0.9).add_(0.1 * x.mean((0, 1)))
    return torch.where(net.seen, x * net.calls, 0.0) + net.ema


def bounded(net, x):
    net.top.copy_(torch.maximum(net.top, x.amax((0, 1)))).relu_()
    return x - net.top


def cache_by_index(net, x):
    net.cache.index_copy_(1, net.place, x)
    net.place.add_(1)
    return net.cache * 1.5


def cache_by_assignment(net, x):
    net.cache[:, net.place] = x
    net.place.add_(1)
    return net.cache.matmul(x.transpose(1, 2)).matmul(x)


def cache_by_slice(net, x):
    net.cache[:, 1:4] = x
    net.cache[:, :1].mul_(0.5).sub_(1.0)
    return net.cache + 1


def cache_by_select(net, x):
    net.cache.select(1, 2).copy_(x[:, 0])
    net.cache.transpose(1, 2)[:, 0].add_(0.25)
    return net.cache + 1


def cache_by_shift(net, x):
    net.cache.copy_(torch.cat([net.cache[:, 3:], x], 1))
    return net.cache.clone()


def cache_by_parts(net, x):
    old, new = net.cache.narrow(1, 0, 5), net.cache.narrow(1, 5, 3)
    new.copy_(x.detach())
    old.add_(1)
    return net.cache * 2


def as_weights(net, x):
    """What a delegate would keep as constants."""
    y = F.conv1d(F.linear(x, net.weight, net.bias).transpose(1, 2), net.kernel).transpose(1, 2)
    y = F.layer_norm(F.prelu(y, net.slope), (8,), net.bias)
    for written in (net.weight, net.bias, net.kernel, net.slope):
        written.mul_(0.5)
    return y


def cache():
    return torch.zeros(1, 8, 8)


MAKE = {
    "average": lambda: Stateful(average, ema=torch.zeros(8)),
    "average from 3": lambda: Stateful(average, ema=torch.full((8,), 3.0)),
    "average without gradients": lambda: Stateful(average_without_gradients, ema=torch.full((8,), 0.3)),
    "average, read first": lambda: Stateful(average_read_first, ema=torch.full((8,), 0.3)),
    "numbers": lambda: Stateful(numbers, ema=torch.ones(8)),
    "several": lambda: Stateful(several, calls=torch.tensor(3), seen=torch.tensor(False), ema=torch.linspace(-1, 1, 8)),
    "bounded": lambda: Stateful(bounded, top=torch.zeros(8)),
    "weights": lambda: Stateful(
        as_weights,
        weight=torch.randn(8, 8),
        bias=torch.randn(8),
        kernel=torch.randn(8, 8, 1),
        slope=torch.full((3,), 0.25),
    ),
    "cache by index": lambda: Stateful(cache_by_index, cache=cache(), place=torch.arange(3)),
    "cache by assignment": lambda: Stateful(cache_by_assignment, cache=cache(), place=torch.arange(3)),
    "cache by slice": lambda: Stateful(cache_by_slice, cache=cache() + 1),
    "cache by select": lambda: Stateful(cache_by_select, cache=cache()),
    "cache by shift": lambda: Stateful(cache_by_shift, cache=cache()),
    "cache by parts": lambda: Stateful(cache_by_parts, cache=cache()),
}
CALLS = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def called(network, calls=CALLS):
    with torch.no_grad():
        return [network(x.clone()).clone() for x in calls]


def worst(expected, found):
    return min(sqnr(ours, theirs) for ours, theirs in zip(expected, found, strict=True))


def state_of(network, model):
    return {name: buffer.clone() for name, buffer in network.named_buffers() if name in dict(model.named_buffers())}


def assert_same_state(network, before):
    now = dict(network.named_buffers())
    assert all(torch.equal(now[name], buffer) for name, buffer in before.items())


def lower(graph, delegate="xnnpack"):
    exported = qf.export(graph, (CALLS[0].clone(),))
    return exported.to_core_aten().to_edge(delegate).to_executorch(strict=True)


def prepare(model, scheme, **given):
    graph = qf.export(model, (CALLS[0],)).module()
    return qf.prepare(graph, XNNPACKQuantizer(scheme), **given)


class WritesInputs(nn.Module):
    """Writes to two of its three inputs, of one a part."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, y, *, z):
        x.mul_(0.5).add_(1.0)
        z[:, 1:].copy_(x[:, 1:] + y[:, 1:])
        return {"a": self.linear(x + y), "b": self.linear(z)}


def three():
    return (torch.randn(2, 3, 8), torch.randn(2, 3, 8)), {"z": torch.randn(2, 3, 8)}
