"""GPTQ never errs more than rounding to nearest."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.ptq.weight_reconstruction.gptq import GPTQ, damped, output_error


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 24), st.sampled_from([2, 4, 8]))
def test_gptq_never_errs_more_than_nearest_rounding(seed, groups, features, bits):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 60, features, generator=random, dtype=torch.float64)
    x = x @ torch.randn(groups, features, features, generator=random, dtype=torch.float64)
    weight = torch.randn(groups, 3, features, generator=random, dtype=torch.float64)
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(2, keepdim=True).clamp(min=1e-6) / top
    covariance = x.transpose(1, 2) @ x / 60
    found = GPTQ(covariance, damped(covariance)).round(weight, scale, torch.zeros_like(scale), -top, top)
    nearest = (weight / scale).round() * scale
    assert (output_error(found - weight, covariance) <= output_error(nearest - weight, covariance) * (1 + 1e-9)).all()
    integers = found / scale
    assert torch.allclose(integers, integers.round(), atol=1e-6)
    assert integers.abs().max() <= top + 1e-6
