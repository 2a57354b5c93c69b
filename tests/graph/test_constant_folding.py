"""Folding computes once what follows from constants alone, and changes no result."""

import time

import pytest
import torch
from constants import COMPUTED, IMAGE, ROWS, captured
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.constants import constant_calls


@pytest.mark.parametrize("name", COMPUTED)
def test_the_values_are_those_of_the_model_to_the_bit(name):
    model, x, graph = captured(*COMPUTED[name])
    fold_constants(graph)
    assert not constant_calls(graph.graph)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(graph(x), model(x))  # the second call reads the same constants


@pytest.mark.parametrize("name", COMPUTED)
def test_folding_again_changes_nothing(name):
    _, _, graph = captured(*COMPUTED[name])
    fold_constants(graph)
    before = [(n.op, n.target) for n in graph.graph.nodes]
    fold_constants(graph)
    assert [(n.op, n.target) for n in graph.graph.nodes] == before


def test_what_varies_is_left():
    class Varies(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))
            self.register_buffer("count", torch.zeros(8))

        def forward(self, x):
            self.count.add_(1)
            lengths = torch.arange(x.shape[0])[:, None]
            return x * (self.weight + torch.rand(8)) + self.count.sqrt() + lengths + torch.zeros_like(x)

    _, _, graph = captured(Varies, ROWS)
    assert not constant_calls(graph.graph)


def test_memory_that_inputs_are_written_into_is_left():
    class Padded(nn.Module):
        def forward(self, x):
            padded = torch.ones(8, 4)
            padded[:, 1:3] = x
            return padded * 2

    model, x = Padded(), torch.randn(8, 2)
    graph = qf.export(model, (x,)).module()
    fold_constants(graph)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(graph(-x), model(-x))


def test_what_is_read_between_two_writes_is_left():
    class Counts(nn.Module):
        def forward(self, x):
            count = torch.ones(8)
            y = x * count
            count.add_(1)
            return y + count

    model, x, graph = captured(Counts, ROWS)
    fold_constants(graph)
    assert torch.equal(graph(x), model(x))


def test_the_caller_can_not_change_a_constant():
    class Returns(nn.Module):
        def forward(self, x):
            anchors = torch.arange(8.0) * 2
            return x + anchors, anchors

    model, x, graph = captured(Returns, ROWS)
    fold_constants(graph)
    for _ in range(2):
        y, anchors = graph(x)
        assert torch.equal(y, model(x)[0])
        assert torch.equal(anchors, torch.arange(8.0) * 2)
        anchors.zero_()


def test_large_values_of_small_tables_are_computed_at_each_call():
    class Expands(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(64))

        def forward(self, x):
            near = self.table[torch.arange(64)[:, None] // 2]
            far = (torch.arange(2048)[:, None] * torch.arange(1024)[None] % 64).float()
            return x * near.sum() + far[:8, :8].sum() * far.mean()

    model, x, graph = captured(Expands, (2, 8))
    fold_constants(graph)
    assert constant_calls(graph.graph) == set()  # only sums of the large value are read
    assert torch.allclose(graph(x), model(x))

    class Reads(nn.Module):
        def forward(self, x):
            return x + (torch.arange(2048.0)[:, None] - torch.arange(1024.0)[None])

    model, x, graph = captured(Reads, (2, 2048, 1024))
    fold_constants(graph)
    assert [op(n) for n in constant_calls(graph.graph)] == [torch.ops.aten.sub.Tensor]
    assert torch.equal(graph(x), model(x))


def test_what_a_large_value_reads_is_not_yet_written():
    class Writes(nn.Module):
        def forward(self, x):
            z = torch.zeros(1)
            big = z + torch.zeros(1, 2**19)
            z.add_(5)
            return x + big + z

    model, x, graph = captured(Writes, (2, 2**19))
    fold_constants(graph)
    assert torch.equal(graph(x), model(x))


def test_dropout_that_is_always_on_is_left():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 8))

        def forward(self, x):
            return F.linear(x, F.dropout(self.weight, 0.5, training=True))

    _, x, graph = captured(Always, ROWS)
    fold_constants(graph)
    assert not torch.equal(graph(x), graph(x))


def test_a_buffer_that_is_stored_is_stored_when_folded():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("frequencies", torch.randn(8))

        def forward(self, x):
            return self.linear(x * (self.frequencies * 6.28).sin())

    first, x, graph = captured(Fourier, ROWS)
    torch.manual_seed(1)
    second = qf.export(Fourier().eval(), (x,), dynamic_batch=True).module().eval()
    fold_constants(graph)
    fold_constants(second)
    second.load_state_dict(graph.state_dict())
    assert torch.equal(second(x), first(x))


def test_the_state_grows_by_a_tenth_at_most_however_often_it_is_folded():
    class Rolls(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.randn(2**18))

        def forward(self, x):
            return sum(x * self.row.roll(places) for places in range(1, 21))

    model, x, graph = captured(Rolls, (2, 2**18))
    before = sum(p.nbytes for p in graph.parameters())
    for _ in range(3):
        fold_constants(graph)
    assert sum(p.nbytes for p in graph.parameters()) <= before + 2**21
    assert torch.equal(graph(x), model(x))


def test_a_chain_of_written_buffers_takes_linear_time():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(300):
                y = torch.zeros(2)
                y.add_(x)
                x = y
            return x

    graph = qf.export(Chain(), (torch.randn(2),)).module()
    start = time.perf_counter()
    assert not constant_calls(graph.graph)
    assert time.perf_counter() - start < 1


def test_a_stand_in_has_the_layout_of_what_it_stands_for():
    class Like(nn.Module):
        def forward(self, x):
            zeros = torch.zeros_like(x.permute(0, 2, 3, 1))
            return x.flatten(1) + zeros.permute(0, 3, 1, 2).view(x.shape[0], -1)

    model, x = Like(), torch.randn(IMAGE)
    graph = qf.export(model, (x,)).module()
    fold_constants(graph)
    assert torch.equal(graph(x), model(x))
