"""Moments do not depend on batching or on the shift."""

import torch

from quantflow.ptq.weight_reconstruction.moments import Moments


def test_moments_do_not_depend_on_batching_or_on_the_shift():
    x, r = torch.randn(1, 90, 5).double() + 100, torch.randn(1, 90, 2).double()
    weights = torch.rand(1, 90).double()
    whole = Moments.of(x, r, weights, x[:, :1])
    parts = [Moments.of(x[:, s], r[:, s], weights[:, s], x[:, 5:6]) for s in (slice(0, 20), slice(20, 90))]
    joined = parts[0] + parts[1]
    for name in ("mean_x", "mean_r", "covariance", "cross_covariance"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
