"""The first ranges of training: no batch hangs on them for ever, whatever the state goes through."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvNet

import quantflow as qf
from quantflow.metrics import decibels
from quantflow.observers import MinMaxObserver, MovingAverageMinMaxObserver
from quantflow.observers.fake_quantize import FakeQuantize
from quantizers import XNNPACKQuantizer


@settings(max_examples=50, deadline=None)
@given(batches=st.integers(1, 130), constant=st.sampled_from([0.5, 0.1, 0.01]), seed=st.integers(0, 2**31))
def test_the_average_is_the_mean_while_young_and_exponential_after(batches, constant, seed):
    x = torch.randn(batches, 16, generator=torch.Generator().manual_seed(seed))
    observer = MovingAverageMinMaxObserver(constant)
    for batch in x:
        observer(batch)
    low = x.double().amin(1)
    young = min(batches, math.ceil(1 / constant))
    expected = low[:young].mean()
    for value in low[young:]:
        expected = expected + constant * (value - expected)
    assert observer.min_val.item() == pytest.approx(expected.item(), rel=1e-4)


def test_it_goes_on_alike_from_a_saved_state_and_a_copy():
    x = torch.randn(40, 8)
    whole = FakeQuantize(MovingAverageMinMaxObserver())
    for batch in x:
        whole(batch)
    half = FakeQuantize(MovingAverageMinMaxObserver())
    for batch in x[:20]:
        half(batch)
    loaded = FakeQuantize(MovingAverageMinMaxObserver())
    loaded.load_state_dict(half.state_dict())
    for taken_up in (loaded, copy.deepcopy(half)):
        for batch in x[20:]:
            taken_up(batch)
        assert torch.equal(taken_up.scale, whole.scale)
        assert torch.equal(taken_up.zero_point, whole.zero_point)


def test_compiled_it_counts_alike():
    eager, x = FakeQuantize(MovingAverageMinMaxObserver()), torch.randn(6, 32)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager")
    for batch in x:
        assert torch.allclose(eager(batch), compiled(batch), atol=1e-5)
    assert twin.activation_post_process.count == 6
    assert torch.allclose(twin.scale, eager.scale)


def test_a_calibrated_range_is_moved_little():
    fake_quantize = FakeQuantize(MovingAverageMinMaxObserver(), MinMaxObserver())
    fake_quantize.calibrate(True)
    fake_quantize(torch.linspace(-1, 1, 100))
    fake_quantize.calibrate(False)
    fake_quantize(torch.tensor([-101.0, 101.0]))
    assert fake_quantize.activation_post_process.max_val.item() == pytest.approx(2.0, abs=0.02)


def test_training_without_calibration_ends_as_with_it():
    """The very first batch is faint; of 48 batches it counts as one."""
    torch.manual_seed(0)
    y = torch.arange(96) % 5
    x = torch.randn(96, 3, 16, 16) + 2 * torch.eye(5)[y, :3, None, None]
    x[:8] *= 0.05
    data = list(zip(x.split(8), y.split(8), strict=True))
    start = qf.export(ConvNet(p=0.0), (x[:2],), dynamic_batch=True).module()
    qf.train(start, data, epochs=2, lr=0.02, progress=False)
    found = {}
    for calibrated in (False, True):
        graph = qf.prepare(start, XNNPACKQuantizer(), qat=True)
        if calibrated:
            qf.calibrate(graph, data, progress=False)
        qf.train(graph, data, epochs=4, lr=0.005, schedule=qf.Schedule.never(), progress=False)
        with torch.no_grad():
            rounded = graph(x[8:])
            for module in graph.modules():
                if isinstance(module, FakeQuantize):
                    module.enable_fake_quant(False)
            exact = graph(x[8:])
        found[calibrated] = decibels(exact.square().sum().item(), (rounded - exact).square().sum().item())
    assert found[False] > found[True] - 2
    assert found[False] > 20
