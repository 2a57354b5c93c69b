"""The float path, for tests: a network lowered without quantization, and beside the model itself."""

import torch
from torch import nn

import quantflow as qf


def lowered(model, *x, delegate="xnnpack", dynamic_batch=False):
    core = qf.export(model.eval(), x, dynamic_batch=dynamic_batch).to_core_aten()
    return core.to_edge(delegate).to_executorch()


def same(model, *x, delegate="xnnpack"):
    """Whether the program on the runtime says what the model says, within float rounding."""
    with torch.no_grad():
        expected, found = model.eval()(*x), lowered(model, *x, delegate=delegate)(*x)
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == theirs.dtype
        if theirs.is_floating_point():
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(ours, theirs)
    return True


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)
