"""What a network writes in place: three calls in a row are eager's, converted and on the runtime, and who looks leaves it."""

import copy

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
from torch import nn
from torch.nn import functional as F
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantflow.ptq import adaround, correct_bias, reconstruct_weights
from quantflow.simulation.output_gradients import output_gradients
from quantflow.simulation.paired_interpreter import run_paired
from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import DYNAMIC_INT8, INT8, XNNPACKQuantizer


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
NETWORKS = pytest.mark.parametrize("name", MAKE)
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


@pytest.mark.parametrize(
    ("name", "delegate"),
    [
        ("average from 3", "xnnpack"),
        ("weights", "xnnpack"),
        ("several", "xnnpack"),
        ("cache by index", "xnnpack"),
        ("cache by select", None),
    ],
)
def test_float(name, delegate):
    model = MAKE[name]().eval()
    program = lower(copy.deepcopy(model), delegate)
    assert worst(called(model), called(program)) > 60


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, INT8) for name in MAKE), ("several", DYNAMIC_INT8), ("cache by index", DYNAMIC_INT8)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.plan.")  # of what runs in float between integers
def test_quantized(name, scheme):
    model = MAKE[name]().eval()
    prepared = qf.calibrate(prepare(model, scheme), CALLS, progress=False)
    assert_same_state(prepared, state_of(model, model))
    converted = qf.convert(prepared)
    program = lower(converted)
    expected, found = called(model), called(converted)
    assert worst(expected, found) > 25
    assert worst(found, called(program)) > 35


@NETWORKS
@pytest.mark.filterwarnings("ignore:.plan.")
def test_training(name):
    """In inference, a graph prepared for training, with rounding off, writes what the eager network writes."""
    model = MAKE[name]().eval()
    prepared = qf.calibrate(prepare(model, INT8, qat=True), CALLS, progress=False)
    assert_same_state(prepared, state_of(model, model))
    exact, converted = copy.deepcopy(prepared), qf.convert(prepared)
    for module in exact.modules():
        if isinstance(module, qf.FakeQuantize):
            module.enable_fake_quant(False)
    expected = called(model)
    assert worst(expected, called(exact)) > 80
    assert worst(called(prepared), called(converted)) > 35


@pytest.mark.parametrize("name", ["average, read first", "several", "cache by slice", "cache by index"])
@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
def test_what_looks_at_a_network_leaves_its_state(name):
    model = MAKE[name]().eval()
    graph = qf.export(model, (CALLS[0],)).module()
    before, sample = state_of(model, model), qf.Sample()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    qf.calibrate(prepared, CALLS, sample=sample, progress=False)
    converted = qf.convert(prepared)
    qf.recover(prepared, sample, progress=False)
    qf.sensitivity(prepared, sample, progress=False)
    qf.diagnose(graph, converted, CALLS, progress=False)
    adaround(prepared, sample, iterations=2, progress=False)
    correct_bias(prepared, sample)
    stages = {"float": model, "graph": graph, "prepared": prepared, "converted": converted}
    figures = qf.verify(stages, CALLS, latency_runs=0, progress=False)
    assert min(output.sqnr_db for stage in figures.stages[1:] for output in stage.outputs) > 20
    for network in (model, graph, prepared, converted):
        assert_same_state(network, before)


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


def written(network, args, kwargs):
    """What ``network`` returns, and its inputs afterwards."""
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad():
        found = network(*args, **kwargs)
    return [found["a"], found["b"], *args, *kwargs.values()]


@pytest.mark.parametrize("scheme", [None, INT8], ids=["float", "int8"])
@pytest.mark.filterwarnings("ignore:.plan.")
def test_inputs_that_the_model_writes_are_written_by_the_program(scheme, tmp_path):
    model, (args, kwargs) = WritesInputs().eval(), three()
    before = copy.deepcopy((args, kwargs))
    graph = qf.export(model, args, kwargs).module()
    if scheme is not None:
        data = [{"x": args[0], "y": args[1], **kwargs}]
        graph = qf.prepare(graph, XNNPACKQuantizer(scheme))
        sample = qf.Sample()
        qf.calibrate(graph, data, sample=sample, progress=False)
        graph = qf.convert(qf.recover(graph, sample, progress=False).graph)
    program = qf.export(graph, args, kwargs).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    for given, kept in zip((*args, kwargs["z"]), (*before[0], before[1]["z"]), strict=True):
        assert torch.equal(given, kept)  # by no verb on the way
    again = qf.load(program.save(tmp_path / "model.pte"))
    expected, converted = written(model, args, kwargs), written(graph, args, kwargs)
    assert worst(expected, converted) > 30
    for found in (written(program, args, kwargs), written(again, args, kwargs)):
        assert worst(converted, found) > 35
        assert all(torch.equal(x, y) for x, y in zip(converted[3:4], found[3:4], strict=True))  # y is not written


def test_integers_that_another_quantizer_asks_for_state_are_refused_by_name():
    quantizer = Stock().set_global(get_symmetric_quantization_config())
    model = MAKE["numbers"]().eval()
    with pytest.raises(qf.QuantflowError, match=r"\[prepare\] (mul|add|clamp)_: .*writes into"):
        qf.prepare(qf.export(model, (CALLS[0],)).module(), quantizer)
    prepared = prepare_pt2e(torch.export.export(model, (CALLS[0],)).module(), quantizer)
    qf.calibrate(prepared, CALLS, progress=False)
    with pytest.raises(qf.QuantflowError, match=r"\[convert\] (mul|add|clamp)_: .*writes into"):
        qf.convert(prepared)


def test_verify_gives_each_stage_the_inputs_as_they_were():
    model, (args, kwargs) = WritesInputs().eval(), three()
    exported = qf.export(model, args, kwargs)
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    batch = {"x": args[0], "y": args[1], **kwargs}
    before = copy.deepcopy(batch)
    stages = {"graph": exported.module(), ".pte": program, "again": program, "eager": model}
    figures = qf.verify(stages, [batch], latency_runs=0, progress=False)
    assert min(output.sqnr_db for stage in figures.stages[1:] for output in stage.outputs) > 60
    assert all(torch.equal(batch[name], given) for name, given in before.items())


class OlderView(nn.Module):
    """A part of a tensor, read by its older name once the tensor was written."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        part = y[..., :4]
        before = self.last(part)
        y.mul_(-2.0)
        return self.last(part) + before


@pytest.mark.filterwarnings("ignore:.plan.")
def test_a_part_is_read_when_it_is_read():
    model, x = OlderView().eval(), CALLS[0]
    prepared = qf.calibrate(prepare(model, INT8), CALLS, progress=False)
    converted = qf.convert(prepared)
    assert sqnr(model(x).detach(), converted(x).detach()) > 30
    assert sqnr(converted(x).detach(), lower(converted)(x)) > 35


def test_a_layer_before_a_write_that_no_other_sees_becomes_integers():
    """Its value is read before, or by the name that the write gives: quantized copies are right."""

    class ReadBefore(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.first(x)
            z = self.last(y)
            return z + self.last(y.relu_())

    plan = XNNPACKQuantizer().plan(qf.export(ReadBefore(), (CALLS[0],)).module())
    assert not plan.floating, str(plan)


class Grows(nn.Module):
    """A counter that the output follows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("count", torch.tensor(0.3))

    def forward(self, x):
        self.count += 1
        return self.conv(x) * 0.5 + self.count * 0.1


@pytest.mark.filterwarnings("ignore:.*left to portable kernels:quantflow.QuantflowWarning")
def test_recovery_leaves_the_ranges_that_state_grows_into():
    model, x = Grows().eval(), torch.rand(2, 3, 6, 6)
    result = qf.quantize(model, (x,), [x] * 8, progress=False)
    assert "keeps state" in str(result.report.recovered)
    twin = copy.deepcopy(model)
    for _ in range(8):
        with torch.no_grad():
            expected = twin(x)
        assert torch.allclose(result.graph(x), expected, atol=0.02)


class WritesWhatBothShare(nn.Module):
    """What quantization does not change, a row of an embedding or zeros, written in place with what it does change."""

    def __init__(self, shared, write):
        super().__init__()
        self.embedding, self.shared, self.write = nn.Embedding(10, 8), shared, write
        self.own, self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, i, z):
        h = self.shared(self, i)
        self.write(h, self.own(z))
        return self.last(self.first(h))


SHARED = {
    "an embedding": lambda net, i: net.embedding(i),
    "zeros": lambda net, i: torch.zeros(i.shape[0], 8),
}
WRITES = {
    "through a slice": lambda h, y: h[:, :4].add_(y),
    "through a part": lambda h, y: h.view(-1, 2, 4).select(1, 1).copy_(y),
    "whole": lambda h, y: h.add_(torch.cat([y, y], 1)).view(-1, 2, 4)[:, 0].mul_(2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("shared", SHARED)
def test_recovery_compares_with_the_float_network_where_both_share_what_is_written(shared, write):
    torch.manual_seed(0)
    model = WritesWhatBothShare(SHARED[shared], WRITES[write]).eval()
    data = [(torch.randint(0, 10, (8,)), torch.randn(8, 4)) for _ in range(4)]
    prepared = qf.prepare(qf.export(model, data[0]).module(), XNNPACKQuantizer())
    prepared = qf.calibrate(prepared, data, progress=False)
    expected = torch.cat([model(*x).detach() for x in data])
    layers = quantized_layers(prepared)
    (last,) = (node for node, layer in layers.items() if layer.weight.args[0].target.endswith("last.weight"))
    for stop in run_paired(prepared, data, layers, title="", progress=False):
        if stop.layer.node is last:
            found = torch.cat([values[last] for values in stop.floats])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        before = sqnr(expected, torch.cat([qf.convert(prepared)(*x) for x in data]))
        for recover in (correct_bias, reconstruct_weights):
            recovered = qf.convert(recover(prepared, data, progress=False))
            assert sqnr(expected, torch.cat([recovered(*x) for x in data])) > before - 1
    assert len(output_gradients(prepared, data, progress=False).rows) == len(layers)
