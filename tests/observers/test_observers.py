"""Observers: ranges over batches, and their place in torchao's protocol."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization.pt2e.observer import ObserverBase

from quantflow.errors import QuantflowError
from quantflow.observers import (
    OBSERVERS,
    EntropyObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
)
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.qparams.qparams import quantize


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), st.integers(1, 5))
def test_min_max_does_not_depend_on_batching(values, parts):
    whole, in_parts = MinMaxObserver(), MinMaxObserver()
    x = torch.tensor(values, dtype=torch.float32)
    whole(x)
    for part in x.chunk(parts):
        in_parts(part)
    assert torch.equal(whole.min_val, in_parts.min_val)
    assert torch.equal(whole.max_val, in_parts.max_val)
    assert whole.min_val == x.min()


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([4, 8]))
def test_mse_range_never_errs_more_than_min_max_on_its_sample(seed, one_signed, bits):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x.abs() if one_signed else x
    grid = {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    errors = []
    for observer in (MSEObserver(**grid), MinMaxObserver(**grid)):
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        if isinstance(observer, MSEObserver):  # what the range is chosen for, extremes included
            sample = torch.cat([observer.sample.flatten(), x.min()[None], x.max()[None]])
        back = (quantize(sample, scale, zero_point, *grid.values()) - zero_point) * scale
        errors.append(float((back - sample).square().mean()))
    assert errors[0] <= errors[1] * (1 + 1e-3)


@given(st.integers(0, 10**6), st.integers(200, 2048))
def test_mse_range_of_little_data_misses_no_tail(seed, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    errors = {}
    for kind in (MSEObserver, MinMaxObserver):
        observer = kind()
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        errors[kind] = float(((quantize(x, scale, zero_point, -128, 127) - zero_point) * scale - x).square().mean())
    # The values that fill up the last round count twice.
    assert errors[MSEObserver] <= 2 * errors[MinMaxObserver]


def test_mse_range_clips_an_outlier_and_its_memory_is_bounded():
    observer = MSEObserver()
    for _ in range(50):
        observer(torch.randn(4, 1000).index_fill(1, torch.tensor([7]), 100.0))
    assert observer.max_val == 100
    assert observer.sample.numel() <= 16 * 2048
    narrow = MSEObserver(quant_min=-8, quant_max=7)
    narrow(torch.cat([torch.randn(10**6), torch.tensor([100.0])]))
    assert narrow.calculate_qparams()[0] < 0.25 * 100 / 15


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_ranges(axis):
    x = torch.randn(3, 4, 5)
    observer = PerChannelMinMaxObserver(qscheme=torch.per_channel_symmetric, ch_axis=axis, quant_min=-127)
    assert observer(x) is x
    other = [d for d in range(3) if d != axis]
    assert torch.equal(observer.max_val, x.amax(other))
    scale, _ = observer.calculate_qparams()
    assert torch.allclose(scale, x.abs().amax(other) / 127)


@pytest.mark.parametrize("constant", [1.0, 0.5, 0.3, 0.01])
def test_moving_average_knows_what_is_left_of_its_first_batches(constant):
    observer = MovingAverageMinMaxObserver(constant)
    for first in (1, 2, 5, 150):
        observer.reset()
        for batch in range(first + 120):
            observer(torch.full((2,), float(batch < first)))
            if batch + 1 >= first:
                left = observer._left(torch.tensor(first), observer.count)
                torch.testing.assert_close(observer.max_val, left.float(), rtol=1e-4, atol=1e-6)


def test_moving_average_starts_with_the_first_batch():
    observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
    observer(torch.tensor([-2.0, 4.0]))
    assert (observer.min_val, observer.max_val) == (-2.0, 4.0)
    observer(torch.tensor([-4.0, 0.0]))
    assert (observer.min_val, observer.max_val) == (-3.0, 2.0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_protocol(name):
    per_tensor, per_channel = OBSERVERS[name]
    for kind in filter(None, (per_tensor, per_channel)):
        made = kind.with_args(dtype=torch.int8, quant_min=-128, quant_max=127)()
        assert isinstance(made, ObserverBase)
    assert per_channel is None or "PerChannel" in per_channel.__name__  # torchao hands ch_axis by this


def test_state_dict_of_per_channel_observers():
    make = lambda: PerChannelMinMaxObserver(qscheme=torch.per_channel_symmetric)  # noqa: E731
    seen, fresh = FakeQuantize(make()), FakeQuantize(make())
    seen(torch.randn(4, 3))
    fresh.load_state_dict(seen.state_dict())
    assert torch.equal(fresh.scale, seen.scale)
    assert fresh.zero_point.dtype == torch.int32


@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantize_lands_on_the_grid_that_convert_uses(per_channel):
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_affine
    kind = OBSERVERS["moving_average"][per_channel]
    fake_quantize = FakeQuantize(kind(qscheme=scheme, quant_min=-127 if per_channel else -128))
    x = torch.randn(6, 50) * torch.linspace(0.1, 3, 6)[:, None]
    y = fake_quantize(x)
    scale, zero_point = fake_quantize.calculate_qparams()
    integers = quantize(x, scale, zero_point, fake_quantize.quant_min, fake_quantize.quant_max)
    back = (integers - (zero_point[:, None] if per_channel else zero_point)) * (
        scale[:, None] if per_channel else scale
    )
    assert torch.allclose(y, back, atol=1e-6)


def test_gradient_is_one_inside_the_range_and_zero_outside():
    fake_quantize = FakeQuantize(MovingAverageMinMaxObserver())
    fake_quantize(torch.tensor([-1.0, 1.0]))
    fake_quantize.eval()
    x = torch.tensor([-5.0, -0.5, 0.25, 5.0], requires_grad=True)
    fake_quantize(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_ranges_move_in_training_only():
    fake_quantize = FakeQuantize(MovingAverageMinMaxObserver())
    fake_quantize(torch.tensor([-1.0, 1.0]))
    frozen = copy.deepcopy(fake_quantize).eval()
    frozen(torch.tensor([-9.0, 9.0]))
    assert torch.equal(frozen.scale, fake_quantize.scale)
    fake_quantize.enable_observer(False)
    fake_quantize(torch.tensor([-9.0, 9.0]))
    assert torch.equal(frozen.scale, fake_quantize.scale)


SAMPLED = ("mse", "percentile", "entropy")


@pytest.mark.parametrize("name", SAMPLED)
def test_every_sampled_observer_gives_each_channel_the_range_it_would_have_alone(name):
    per_tensor, per_channel = OBSERVERS[name]
    x = (
        torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 4.0, 0.2, 9.0, 1.0])[:, None]
    )
    together = per_channel(qscheme=torch.per_channel_affine, ch_axis=1)
    together(x)
    scales, zero_points = together.calculate_qparams()
    for channel in range(5):
        alone = per_tensor()
        alone(x[:, channel])
        scale, zero_point = alone.calculate_qparams()
        assert float(scale) == pytest.approx(float(scales[channel]), rel=0.05)
        assert abs(int(zero_point) - int(zero_points[channel])) <= 3


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_observers_are_bounded_and_go_on_from_their_state(name):
    batches = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    whole, first, second = (OBSERVERS[name][0]() for _ in range(3))
    for index, batch in enumerate(batches):
        whole(batch)
        if index < 23:
            first(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[23:]:
        second(batch)
    assert whole.sample.numel() <= 16 * 2048
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert second.calculate_qparams() == whole.calculate_qparams()


@pytest.mark.parametrize(("percentile", "expected"), [(100, 4.56), (99.0, 2.326), (95.0, 1.645)])
def test_percentiles_of_a_known_distribution(percentile, expected):
    observer = PercentileObserver(percentile)
    for batch in torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)):
        observer(batch)
    low, high = observer.choose_range(observer.sample.flatten()[None], observer.min_val[None], observer.max_val[None])
    assert float(high) == pytest.approx(expected, rel=0.1)
    assert float(low) == pytest.approx(-expected, rel=0.1)
    assert percentile < 100 or (low, high) == (observer.min_val, observer.max_val)
    with pytest.raises(QuantflowError, match="percentile"):
        PercentileObserver(20)


def test_entropy_keeps_all_of_an_even_distribution_and_cuts_a_lone_outlier():
    even, outlier = torch.rand(30000, generator=torch.Generator().manual_seed(0)), torch.randn(30000)
    outlier[0] = 200.0
    widths = []
    for x in (even, outlier):
        observer = EntropyObserver()
        for part in x.split(2000):
            observer(part)
        widths.append(float(observer.calculate_qparams()[0]) * 255)
    assert widths[0] > 0.95
    assert widths[1] < 40
