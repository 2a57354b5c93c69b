"""State that is kept and given back: also the buffers that a call makes."""

import torch
from torch import nn

from quantflow.graph.own_state import state_kept

CALLS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Remembers(nn.Module):
    """Makes a buffer in its first call, and puts another in the place of one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", None)
        self.register_buffer("sum", torch.zeros(8))

    def forward(self, x):
        self.sum = self.sum + x.sum(0)
        self.last = x if self.last is None else self.last + x
        return self.last + self.sum


def test_buffers_that_a_call_makes_are_given_back():
    model = Remembers()
    with state_kept(model):
        model(CALLS[0])
    assert model.last is None
    assert not model.sum.any()
    with state_kept(model):
        pass
    assert torch.equal(model(CALLS[0]), CALLS[0] + CALLS[0].sum(0))
