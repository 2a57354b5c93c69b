"""Folding computes once what follows from constants alone, and changes no result."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.analysis.reference import reference_graph
from quantflow.graph.aten import op
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.constants import constant_calls, follows_from_constants
from quantflow.metrics import signal_to_noise
from quantflow.ptq import equalize
from quantizers import XNNPACKQuantizer


class StandardizedConv(nn.Conv2d):
    """A convolution with standardised weights, as NFNets have it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        flat = F.batch_norm(flat, None, None, self.gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias, self.stride, self.padding)


class JoinedBias(nn.Module):
    """A linear layer of which the bias is joined from parts, as BEiT has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 8))
        self.first, self.last = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.linear(x, self.weight, torch.cat([self.first, torch.zeros_like(self.last), self.last]))


class WrittenMask(nn.Module):
    """A mask that is written in place, as Swin has it."""

    def forward(self, x):
        mask = x.new_zeros(4, 4)
        mask[:2, 2:] = -1.0
        mask[2:, :2] = -1.0
        return x + mask


class Positions(nn.Module):
    """A table that is read at computed indices."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 3))

    def forward(self, x):
        offsets = torch.arange(4)[:, None] - torch.arange(4)[None] + 3
        return x + self.table[offsets].permute(2, 0, 1).sigmoid() * 16


IMAGE, ROWS, GRID = (2, 3, 8, 8), (2, 8), (2, 3, 4, 4)
COMPUTED = {
    "standardised weight": (lambda: StandardizedConv(3, 8, 3), IMAGE),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), IMAGE),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), ROWS),
    "joined bias": (JoinedBias, ROWS),
    "written mask": (WrittenMask, GRID),
    "table of positions": (Positions, GRID),
}


def _captured(make, shape):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    return model, x, qf.export(model, (x,), dynamic_batch=True).module().eval()


@pytest.mark.parametrize("name", COMPUTED)
def test_the_values_are_those_of_the_model_to_the_bit(name):
    model, x, graph = _captured(*COMPUTED[name])
    fold_constants(graph)
    assert not constant_calls(graph.graph)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(graph(x), model(x))  # the second call reads the same constants


@pytest.mark.parametrize("name", COMPUTED)
def test_folding_again_changes_nothing(name):
    _, _, graph = _captured(*COMPUTED[name])
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

    _, _, graph = _captured(Varies, ROWS)
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

    model, x, graph = _captured(Counts, ROWS)
    fold_constants(graph)
    assert torch.equal(graph(x), model(x))


def test_the_caller_can_not_change_a_constant():
    class Returns(nn.Module):
        def forward(self, x):
            anchors = torch.arange(8.0) * 2
            return x + anchors, anchors

    model, x, graph = _captured(Returns, ROWS)
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

    model, x, graph = _captured(Expands, (2, 8))
    fold_constants(graph)
    assert constant_calls(graph.graph) == set()  # only sums of the large value are read
    assert torch.allclose(graph(x), model(x))

    class Reads(nn.Module):
        def forward(self, x):
            return x + (torch.arange(2048.0)[:, None] - torch.arange(1024.0)[None])

    model, x, graph = _captured(Reads, (2, 2048, 1024))
    fold_constants(graph)
    assert [op(n) for n in constant_calls(graph.graph)] == [torch.ops.aten.sub.Tensor]
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("name", ["standardised weight", "weight norm", "spectral norm", "joined bias"])
def test_layers_with_computed_weights_are_quantized(name, qat):
    model, x, graph = _captured(*COMPUTED[name])
    quantizer = XNNPACKQuantizer()
    assert [o.becomes for o in quantizer.plan(graph, qat=qat).operators] == ["int8"]
    prepared = qf.prepare(graph, quantizer, qat=qat)
    qf.calibrate(prepared, [x], progress=False)
    converted = qf.convert(prepared)
    assert not any(op(n) is torch.ops.aten.batch_norm.default for n in converted.graph.nodes)
    program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert not program.delegation.portable
    assert torch.allclose(program(x), model(x), atol=0.05 * float(model(x).detach().abs().max()))


@pytest.mark.parametrize("name", ["standardised weight", "weight norm", "spectral norm", "joined bias"])
def test_a_computed_weight_trains_under_its_own_names(name):
    model, x, graph = _captured(*COMPUTED[name])
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    qf.calibrate(prepared, [x], progress=False)
    own = dict(prepared.named_parameters())
    assert own.keys() == dict(model.named_parameters()).keys()
    before = copy.deepcopy(prepared.state_dict())
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared.train()
    prepared(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in own.values())
    optimizer.step()
    assert any(not torch.equal(before[key], prepared.state_dict()[key]) for key in own)
    prepared.eval()
    assert torch.allclose(qf.convert(prepared)(x), prepared(x), atol=1e-5)
    model.load_state_dict({key: value for key, value in prepared.state_dict().items() if key in model.state_dict()})


@pytest.mark.parametrize("name", ["standardised weight", "joined bias"])
def test_without_rounding_a_graph_prepared_for_training_is_the_model(name):
    model, x, graph = _captured(*COMPUTED[name])
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    for module in prepared.modules():
        if isinstance(module, qf.FakeQuantize):
            module.disable_fake_quant()
    prepared.train()
    model.train()
    for network in (model, prepared):
        network.zero_grad()
        network(x).square().sum().backward()
    assert torch.equal(prepared(x), model(x))
    theirs = dict(model.named_parameters())
    for key, parameter in prepared.named_parameters():
        assert torch.equal(parameter.grad, theirs[key].grad)


def test_a_batch_norm_behind_a_computed_weight_is_folded():
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__(StandardizedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            nn.init.uniform_(self[1].running_var, 0.5, 2.0)
            nn.init.normal_(self[1].running_mean)

    model, x, graph = _captured(Normed, IMAGE)
    for qat in (False, True):
        prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
        qf.calibrate(prepared, [x], progress=False)
        converted = qf.convert(prepared)
        assert not any(op(n) is torch.ops.aten.batch_norm.default for n in converted.graph.nodes)
        assert signal_to_noise(model(x), converted(x)) > 30
        if qat:
            assert signal_to_noise(prepared.eval()(x), converted(x)) > 45  # the bias is rounded


def test_what_a_large_value_reads_is_not_yet_written():
    class Writes(nn.Module):
        def forward(self, x):
            z = torch.zeros(1)
            big = z + torch.zeros(1, 2**19)
            z.add_(5)
            return x + big + z

    model, x, graph = _captured(Writes, (2, 2**19))
    fold_constants(graph)
    assert torch.equal(graph(x), model(x))


def test_dropout_that_is_always_on_is_left():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 8))

        def forward(self, x):
            return F.linear(x, F.dropout(self.weight, 0.5, training=True))

    _, x, graph = _captured(Always, ROWS)
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

    first, x, graph = _captured(Fourier, ROWS)
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

    model, x, graph = _captured(Rolls, (2, 2**18))
    before = sum(p.nbytes for p in graph.parameters())
    for _ in range(3):
        fold_constants(graph)
    assert sum(p.nbytes for p in graph.parameters()) <= before + 2**21
    assert torch.equal(graph(x), model(x))


def test_a_dynamic_weight_does_not_follow_from_constants():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return F.linear(x, self.weight * x.mean())

    _, _, graph = _captured(Dynamic, ROWS)
    (linear,) = (n for n in graph.graph.nodes if op(n) is torch.ops.aten.linear.default)
    assert not follows_from_constants(linear.args[1])
    assert XNNPACKQuantizer().plan(graph).decisions[-1].reason == "its weight is computed, not constant"


def test_a_computed_weight_before_a_norm_is_equalized_referenced_and_recovered():
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__(StandardizedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    model, x, graph = _captured(Normed, IMAGE)
    assert torch.allclose(equalize(graph)(x), model(x), atol=1e-5)
    assert torch.allclose(reference_graph(graph, "test")(x), model(x), atol=1e-5)
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], progress=False)
    recovered = qf.recover(prepared, [x], progress=False).graph
    recovered.train()(x).square().sum().backward()
    assert signal_to_noise(model(x), qf.convert(recovered.eval())(x)) > 25


def test_what_a_quantizer_transposes_is_one_parameter():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.matrix

    _, _, graph = _captured(Product, ROWS)
    assert len(list(qf.prepare(graph, XNNPACKQuantizer()).parameters())) == 1


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
