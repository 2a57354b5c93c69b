import pytest
import torch

from quantflow.upstream import quantized_decomposed

OPERATORS = torch.ops.quantized_decomposed


def test_the_import_registers_the_operators():
    assert quantized_decomposed is not None
    x = torch.tensor([-1.0, 0.0, 0.26])
    q = OPERATORS.quantize_per_tensor.default(x, 0.5, 3, -128, 127, torch.int8)
    assert q.tolist() == [1, 3, 4]
    assert OPERATORS.dequantize_per_tensor.default(q, 0.5, 3, -128, 127, torch.int8).tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", ["per_channel", "per_token", "per_channel_group"])
def test_each_granularity_has_a_pair(name):
    for verb in ("quantize", "dequantize"):
        assert hasattr(OPERATORS, f"{verb}_{name}")
