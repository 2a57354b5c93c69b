"""The least squares correction finds a planted map, and nothing in noise."""

import torch

from quantflow.ptq.weight_reconstruction.least_squares import correction
from quantflow.ptq.weight_reconstruction.moments import Moments


def _moments(x, r):
    return Moments.of(x, r, torch.ones(x.shape[:2]), x.mean(1, keepdim=True))


def test_the_correction_finds_a_planted_map_and_nothing_in_noise():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4000, 6, generator=random) + 3
    planted = torch.randn(2, 4, 6, generator=random)
    halves = [
        _moments(x[:, part], x[:, part] @ planted.transpose(1, 2)) for part in (slice(0, 2000), slice(2000, None))
    ]
    torch.testing.assert_close(correction(*halves).float(), planted, rtol=1e-2, atol=1e-2)
    noise = torch.randn(2, 4000, 4, generator=random)
    halves = [_moments(x[:, part], noise[:, part]) for part in (slice(0, 2000), slice(2000, None))]
    assert correction(*halves).abs().max() < 0.05
