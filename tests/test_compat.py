"""The first names of the API warn and work."""

import pytest
import torch
from networks import ConvNet

import quantflow as qf
from quantflow.compat import capture_pre_autograd_graph, exir


def test_old_names():
    x = torch.randn(2, 3, 16, 16)
    model = ConvNet().eval()
    with pytest.warns(DeprecationWarning, match=r"qf\.export\(model, args\)\.module\(\)"):
        graph = capture_pre_autograd_graph(model, (x,))
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    with pytest.warns(DeprecationWarning, match="to_core_aten"):
        core = exir.capture(graph, (x,))
    assert isinstance(core, qf.CoreAten)
    program = core.to_edge().to_executorch()
    assert torch.allclose(program(x), model(x), atol=1e-4)
