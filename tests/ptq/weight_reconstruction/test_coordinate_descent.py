"""Coordinate descent never raises an output's error, and ends where no single integer is better."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.ptq.weight_reconstruction.coordinate_descent import best_scale, descend
from quantflow.ptq.weight_reconstruction.gptq import damped, nearest, output_error

SEEDS = st.integers(0, 10**6)


def _case(seed, groups, features, top, zero_point):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 60, features, generator=random, dtype=torch.float64)
    x = x @ torch.randn(groups, features, features, generator=random, dtype=torch.float64)
    weight = torch.randn(groups, 3, features, generator=random, dtype=torch.float64)
    scale = (weight.abs().amax(2, keepdim=True).clamp(min=1e-6) / top).float().double()
    zero_point = torch.full_like(scale, zero_point)
    limits = -top, top
    rounded = nearest(weight, scale, zero_point, *limits)
    return weight, rounded, damped(x.transpose(1, 2) @ x / 60), scale, zero_point, limits


@given(SEEDS, st.integers(1, 3), st.sampled_from([1, 2, 17, 140]), st.sampled_from([1, 7, 127]), st.integers(-1, 1))
def test_no_output_errs_more(seed, groups, features, top, zero_point):
    weight, rounded, hessian, scale, zero_point, limits = _case(seed, groups, features, top, zero_point)
    found = descend(weight, rounded, hessian, scale, zero_point, *limits)
    before, after = (output_error(w - weight, hessian) for w in (rounded, found))
    assert (after <= before * (1 + 1e-9)).all()
    integers = found / scale + zero_point
    assert torch.allclose(integers, integers.round(), atol=1e-6)
    assert integers.min() >= limits[0] - 1e-6
    assert integers.max() <= limits[1] + 1e-6


@given(SEEDS)
def test_no_single_integer_is_better_at_the_end(seed):
    weight, found, hessian, scale, zero_point, limits = _case(seed, 1, 5, 7, 0)
    for _ in range(20):
        found = descend(weight, found, hessian, scale, zero_point, *limits)
    error = output_error(found - weight, hessian)
    for feature in range(5):
        for change in (-1, 1):
            other = found.clone()
            other[..., feature] += change * scale[..., 0]
            inside = (torch.round(other / scale).abs() <= 7).all(2)
            assert (output_error(other - weight, hessian) >= error * (1 - 1e-9))[inside].all()


@given(SEEDS, st.integers(1, 3), st.integers(1, 12))
def test_no_scale_nearby_is_better_than_the_best(seed, groups, features):
    weight, rounded, hessian, scale, _, _ = _case(seed, groups, features, 7, 0)
    levels = torch.round(rounded / scale)
    found = best_scale(weight, rounded, hessian, scale)
    least = output_error(levels * found - weight, hessian)
    assert (least <= output_error(rounded - weight, hessian) * (1 + 1e-9)).all()
    for factor in (0.99, 1.01):
        assert (least <= output_error(levels * found * factor - weight, hessian) * (1 + 1e-5) + 1e-12).all()
