"""Calibration takes what loaders give, and ends when what watches has settled, whatever prepared the graph."""

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as StockQuantizer
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
from networks import ConvNet, Text, randomize_statistics
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

import quantflow as qf
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer

EXAMPLE = (torch.randn(2, 3, 16, 16),)


class Counted:
    """Batches whose range grows each time, until it stays; ``taken`` tells how many were asked for."""

    def __init__(self, growing, count=50):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 16, 16)
        self.batches = [x * (1 + 0.2 * min(i, growing - 1)) for i in range(count)]
        self.taken = 0

    def __iter__(self):
        for batch in self.batches:
            self.taken += 1
            yield batch


def stock(*, qat=False):
    graph = qf.export(ConvNet(p=0.0).eval(), EXAMPLE).module()
    quantizer = StockQuantizer().set_global(get_symmetric_quantization_config(is_qat=qat))
    return (prepare_qat_pt2e if qat else prepare_pt2e)(graph, quantizer)


def ours(*, qat=False, quantizer=None):
    graph = qf.export(ConvNet(p=0.0).eval(), EXAMPLE).module()
    return qf.prepare(graph, quantizer or XNNPACKQuantizer(), qat=qat)


@pytest.mark.parametrize("prepared", [ours, stock])
@pytest.mark.parametrize("qat", [False, True])
def test_patience_waits_while_ranges_grow(prepared, qat):
    data = Counted(growing=20)
    qf.calibrate(prepared(qat=qat), data, patience=3, progress=False)
    # The stock average for training lags behind its batches.
    assert data.taken == 23 if prepared is ours or not qat else 23 <= data.taken <= 50


def test_patience_where_there_is_no_range_to_follow():
    data = Counted(growing=20)
    graph = ours(quantizer=XNNPACKQuantizer(DYNAMIC_INT8))
    qf.calibrate(graph, data, patience=3, progress=False)
    assert data.taken == 4


@pytest.mark.parametrize("fake_quantize", [qf.FakeQuantize, qf.LearnedStepSize])
def test_a_calibration_that_fails_leaves_what_was_trained(fake_quantize):
    torch.manual_seed(0)
    x, y = torch.randn(8, 8), torch.randint(0, 8, (8,))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    graph = qf.export(model, (x,)).module()
    graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True, fake_quantize=fake_quantize)
    qf.calibrate(graph, [x], progress=False)
    qf.train(graph, [(x, y)] * 4, lr=0.5, progress=False)
    expected, state = graph(x), {name: t.clone() for name, t in graph.state_dict().items()}
    for data in ([], [torch.randn(3, 3)], [7 * x, torch.randn(3, 3)]):
        with pytest.raises(qf.QuantflowError):
            qf.calibrate(graph, data, progress=False)
        assert torch.equal(graph(x), expected)
        if len(data) < 2:
            assert all(torch.equal(t, state[name]) for name, t in graph.state_dict().items())
    qf.calibrate(graph, [7 * x], progress=False)
    assert not torch.equal(graph(x), expected)


def test_calibration_keeps_what_came_before_a_faulty_batch():
    x = torch.randn(4, 3, 16, 16)
    prepared = qf.prepare(qf.export(ConvNet(), (x,)).module(), XNNPACKQuantizer())
    with pytest.raises(qf.QuantflowError, match="batch 1, input x"):
        qf.calibrate(prepared, [x, x[:, :, :5]], progress=False)
    qf.convert(prepared)


@pytest.mark.parametrize(
    "data",
    [
        lambda x: [x],
        lambda x: [(x, torch.zeros(4))],
        lambda x: [[x]],
        lambda x: [{"x": x, "labels": torch.zeros(4)}],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(4)), 2),
    ],
)
def test_calibration_takes_what_loaders_give(data):
    x = torch.randn(4, 3, 16, 16)
    prepared = qf.prepare(qf.export(ConvNet(), (x,), dynamic_batch=True).module(), XNNPACKQuantizer())
    qf.convert(qf.calibrate(prepared, data(x), progress=False))


def test_an_ambiguous_batch_is_picked_by_the_caller():
    x = torch.randn(4, 3, 16, 16)
    prepared = qf.prepare(qf.export(ConvNet(), (x,)).module(), XNNPACKQuantizer())
    qf.calibrate(prepared, [("id", x, 0)], inputs=lambda batch: batch[1], progress=False)
    qf.convert(prepared)


def test_calibration_stops_when_ranges_have_settled():
    graph = qf.export(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_batch=True).module()
    seen = []

    def batches(sizes):
        for size in sizes:
            seen.append(size)
            yield torch.full((2, 4), float(size))

    qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), batches([1, 2, 2, 3, 3, 3, 3, 9]), patience=3, progress=False)
    assert seen == [1, 2, 2, 3, 3, 3, 3]


def test_a_calibrated_state_loads_with_its_ranges():
    x = torch.randn(4, 3, 16, 16)
    graph = qf.export(randomize_statistics(ConvNet()), (x,)).module().eval()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    loaded = qf.prepare(graph, XNNPACKQuantizer())
    loaded.load_state_dict(prepared.state_dict())
    assert torch.equal(qf.convert(loaded)(x), qf.convert(prepared)(x))


def test_two_inputs_and_a_target():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.linear(a + b)

    a = torch.randn(2, 4)
    graph = qf.prepare(qf.export(Two(), (a, a)).module(), XNNPACKQuantizer())
    for batch in (((a, a), torch.zeros(2)), (a, a), (a, a, torch.zeros(2))):
        qf.calibrate(graph, [batch], progress=False)


IDS = torch.randint(50, (8, 6))


def prepared(model, x):
    graph = qf.export(model.eval(), (x,), dynamic_batch=True).module()
    return graph, qf.prepare(graph, XNNPACKQuantizer())


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
def test_a_batch_that_the_graph_does_not_run_on_is_named():
    _, text = prepared(Text(), IDS)
    with pytest.raises(qf.QuantflowError, match="does not run") as raised:
        qf.calibrate(text, [IDS, IDS + 50], progress=False)
    assert (raised.value.stage, raised.value.node) == ("calibrate", "batch 1")
