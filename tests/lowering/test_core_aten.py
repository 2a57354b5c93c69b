"""Core ATen holds core operators alone, refuses training, and names what has no core form."""

import pytest
import torch
from networks import ConvNet
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer

X = torch.randn(2, 3, 16, 16)


def test_core_aten_holds_core_operators_and_refuses_training():
    core = qf.export(ConvNet(), (X,)).to_core_aten()
    calls = [n.target for n in core.program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert calls
    assert all(torch.Tag.core in target.tags for target in calls)
    for attempt in (lambda: core.train(), lambda: core.module().train(), lambda: core.module()(X.requires_grad_())):
        with pytest.raises(qf.QuantflowError, match=r"Exported\.module") as caught:
            attempt()
        assert caught.value.stage == "core-aten"
    X.requires_grad_(False)
    with pytest.raises(qf.QuantflowError, match=r"Exported\.module"):
        qf.prepare(core, XNNPACKQuantizer())


def test_an_operator_without_a_core_form_is_named():
    class Factor(nn.Module):
        def forward(self, x):
            return torch.linalg.qr(x)[0]

    with pytest.raises(qf.QuantflowError, match="linalg_qr"):
        qf.export(Factor(), (torch.randn(4, 4),)).to_core_aten()
