"""Laws of the one qparam routine."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantflow.qparams.qparams import choose_qparams, quantize

FINITE = st.floats(-1e4, 1e4, allow_nan=False, width=32)
GRIDS = st.sampled_from([(-128, 127), (-127, 127), (0, 255), (-8, 7), (-7, 7)])


@given(FINITE, FINITE, GRIDS, st.booleans())
def test_zero_is_exact_and_the_range_covered(a, b, grid, symmetric):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    quant_min, quant_max = grid
    scale, zero_point = choose_qparams(low, high, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric)
    assert scale > 0
    assert quant_min <= zero_point <= quant_max
    assert zero_point.dtype == torch.int32
    ends = (torch.tensor([quant_min, quant_max]) - zero_point) * scale
    # Zero is always inside; the grid may be half a step short at either end, for zero to be exact.
    assert ends[0] <= min(low, 0) + scale
    assert ends[1] >= max(high, 0) - scale


@given(st.lists(FINITE, min_size=2, max_size=40), GRIDS)
def test_rounding_errs_by_half_a_step_inside_the_range(values, grid):
    x = torch.tensor(values, dtype=torch.float32)
    quant_min, quant_max = grid
    scale, zero_point = choose_qparams(x.min(), x.max(), quant_min=quant_min, quant_max=quant_max, symmetric=False)
    integers = quantize(x, scale, zero_point, quant_min, quant_max)
    assert torch.equal(integers, integers.round())
    back = (integers - zero_point) * scale
    # One step at the ends, where the zero point was rounded.
    assert ((back - x).abs() <= scale * 1.01).all()


@given(st.lists(FINITE, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_a_symmetric_grid_scales_with_its_tensor(values, factor):
    bound = torch.tensor(values).abs().clamp(min=1.0)  # above the smallest scale
    arguments = {"quant_min": -127, "quant_max": 127, "symmetric": True}
    scale, zero_point = choose_qparams(-bound, bound, **arguments)
    scaled, _ = choose_qparams(-bound * factor, bound * factor, **arguments)
    assert torch.allclose(scaled, scale * factor, rtol=1e-5)
    assert (zero_point == 0).all()


def test_unsigned_symmetric_grid_has_its_middle_as_zero_point():
    _, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(1.0), quant_min=0, quant_max=255, symmetric=True)
    assert zero_point == 128
