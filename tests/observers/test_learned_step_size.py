"""LSQ: scales with the paper's gradient, that learn, convert, compile and resume."""

import copy
import shutil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import ConvNet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantflow as qf
from quantflow.observers import MovingAverageMinMaxObserver, PerChannelMovingAverageMinMaxObserver
from quantflow.qparams.rounding import round_to_grid
from quantizers import DYNAMIC_INT8, W4A8, XNNPACKQuantizer

Y = torch.arange(32) % 5
X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + torch.eye(5)[Y, :3, None, None]


def prepared(scheme=W4A8):
    captured = qf.export(ConvNet(p=0.0), (X[:2],), dynamic_batch=True).module()
    return qf.prepare(captured, XNNPACKQuantizer(scheme), qat=True, fake_quantize=qf.LearnedStepSize)


def loader():
    return DataLoader(TensorDataset(X, Y), 8)


def paper(x, scale, zero_point, low, high, gradient):
    """Equation 3 of the paper, by hand."""
    position = x / scale
    inside = (position > low - zero_point) & (position < high - zero_point)
    rounded = position.round().clamp(low - zero_point, high - zero_point)
    to_scale = torch.where(inside, rounded - position, rounded) * gradient
    return to_scale, torch.where(inside, gradient, 0.0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), zero_point=st.integers(-100, 100), per_channel=st.booleans())
def test_gradient_is_the_papers(seed, zero_point, per_channel):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(6, 40, generator=generator) * 2).requires_grad_()
    scale = (torch.rand(6 if per_channel else (), generator=generator) * 0.02 + 0.005).requires_grad_()
    gradient = torch.randn(6, 40, generator=generator)
    zeros = torch.full_like(scale, zero_point, dtype=torch.int32)
    round_to_grid(x, scale, zeros, -128, 127, 0).backward(gradient)
    wide = scale.detach()[:, None] if per_channel else scale.detach()
    position = 2 * x.detach() / wide
    assume(not ((position - position.round()).abs() < 1e-4).any())  # at a tie, or at an end, the last bit decides
    to_scale, to_x = paper(x.detach(), wide, zero_point, -128, 127, gradient)
    expected = to_scale.sum(1) if per_channel else to_scale.sum()
    assert torch.allclose(scale.grad, expected, rtol=1e-3, atol=2e-2)
    assert torch.allclose(x.grad, to_x)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_gradient_is_the_same_compiled():
    x, scale = torch.randn(6, 40), torch.rand(6) * 0.02 + 0.005
    zeros = torch.zeros(6, dtype=torch.int32)
    grads = []
    for function in (round_to_grid, torch.compile(round_to_grid)):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = function(a, s, zeros, -128, 127, 0)
        y.square().sum().backward()
        grads.append((y.detach(), a.grad, s.grad))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)


def test_scales_descend_to_less_error():
    """From a range three times too wide, learning alone brings the error of rounding down."""
    x = torch.randn(4, 500)
    observer = PerChannelMovingAverageMinMaxObserver(
        1.0, qscheme=torch.per_channel_symmetric, quant_min=-7, quant_max=7
    )
    learned = qf.LearnedStepSize(observer)
    observer(x * 3)
    learned.update_qparams()
    before = (learned(x) - x).square().mean()
    optimizer = torch.optim.SGD(learned.parameters(), 10.0)
    for _ in range(300):
        optimizer.zero_grad()
        (learned(x) - x).square().mean().backward()
        optimizer.step()
    assert (learned(x) - x).square().mean() < 0.2 * before


@pytest.mark.parametrize("scheme", [W4A8, XNNPACKQuantizer().scheme], ids=["W4A8", "INT8"])
def test_converts_to_what_was_trained(scheme):
    graph = qf.calibrate(prepared(scheme), loader(), progress=False)
    scales = {name: p.detach().clone() for name, p in graph.named_parameters() if name.endswith(".scale")}
    assert scales
    history = qf.train(graph, loader(), epochs=6, lr=0.05, progress=False)
    assert history.loss[-1] < history.loss[0]
    assert all(not torch.equal(p, scales[n]) for n, p in graph.named_parameters() if n in scales)
    with torch.no_grad():
        converted = qf.convert(graph)
        off = (graph(X) - converted(X)).abs()
    # The device's biases are in whole steps of int32, so a value now and then is rounded the other way.
    step = [n.args[1] for n in converted.graph.nodes if "quantize_per_tensor" in str(n.target)][-1]
    assert off.max() <= 1.001 * step
    assert (off > 0.5 * step).float().mean() <= 0.1


def test_starts_from_the_first_batch_and_follows_until_rounding_begins():
    learned = qf.LearnedStepSize(MovingAverageMinMaxObserver(1.0))
    learned.enable_fake_quant(False)
    for size in (1.0, 4.0):
        learned(torch.tensor([-size, size]))
        assert learned.scale.item() == pytest.approx(2 * size / 255)
    learned.enable_fake_quant()
    learned(torch.tensor([-9.0, 9.0]))
    assert learned.scale.item() == pytest.approx(8 / 255)


def test_saved_and_loaded_goes_on_where_it_was():
    graph = qf.calibrate(prepared(), loader(), progress=False)
    qf.train(graph, loader(), lr=0.05, progress=False)
    fresh = prepared()
    fresh.load_state_dict(graph.state_dict())
    copied = copy.deepcopy(graph)
    for g in (fresh, copied):
        assert torch.equal(g.eval()(X), graph(X))
        before = {n: p.detach().clone() for n, p in g.named_parameters() if n.endswith(".scale")}
        g.train()(X * 3)  # no range follows the data any more
        assert all(torch.equal(p, before[n]) for n, p in g.named_parameters() if n in before)


def test_dynamic_ranges_are_not_learned():
    model = torch.nn.Linear(8, 4)
    captured = qf.export(model, (torch.randn(2, 8),)).module()
    graph = qf.prepare(captured, XNNPACKQuantizer(DYNAMIC_INT8), qat=True, fake_quantize=qf.LearnedStepSize)
    kinds = [type(m) for m in graph.modules() if isinstance(m, qf.FakeQuantize)]
    assert sorted(k.__name__ for k in kinds) == ["LearnedStepSize", "PerTokenFakeQuantize"]


def test_learned_steps_train_what_is_written_in_place():
    model, x = (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten()),
        torch.randn(2, 4, 8, 8),
    )
    graph = qf.export(model, (x,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True, fake_quantize=qf.LearnedStepSize)
    history = qf.train(prepared, [(x, torch.tensor([0, 1]))], epochs=2, progress=False)
    assert len(history.loss) == 2
