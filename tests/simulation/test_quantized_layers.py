"""A layer is its rows times its matrices."""

import pytest
import torch
from calibrated import calibrated
from torch import nn

from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import XNNPACKQuantizer

LAYERS = [
    (nn.Conv2d(3, 4, 3), (2, 3, 7, 8)),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2), (2, 4, 7, 5)),
    (nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=4, bias=False), (3, 4, 6, 6)),
    (nn.Conv1d(3, 5, 3, padding=1), (2, 3, 9)),
    (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3, bias=False), (2, 6, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_a_layer_is_its_rows_times_its_matrices(layer, shape):
    x = torch.randn(shape)
    quantizer = XNNPACKQuantizer() if not isinstance(layer, nn.Conv3d) else _Conv3dQuantizer()
    graph = calibrated(nn.Sequential(layer, nn.ReLU()), (x,), [x], quantizer)
    (found,) = quantized_layers(graph).values()
    with torch.no_grad():
        y = layer(x)
        index = found.draw(y, 0, 10**6)
        bias = 0 if layer.bias is None else layer.bias.reshape(found.groups, 1, -1)
        rows = found.inputs(x, y, index) @ found.matrices(layer.weight).transpose(1, 2) + bias
    torch.testing.assert_close(rows, found.outputs(y, index), rtol=1e-4, atol=1e-5)
    assert found.outputs(y, index).numel() == y.numel()
    few = found.draw(y, 3, 2)
    assert torch.equal(few, found.draw(y, 3, 2))
    assert len(few) <= 2 * len(x)
    torch.testing.assert_close(found.outputs(y, few), found.outputs(y, index)[:, few], rtol=0, atol=0)


def _Conv3dQuantizer():  # noqa: N802
    from quantflow.graph.aten import aten
    from quantizers import Rule, RuleQuantizer

    return RuleQuantizer(rules=(Rule("conv", frozenset({aten.conv3d.default}), weight="weight"),))
