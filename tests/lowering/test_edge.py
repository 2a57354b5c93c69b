"""Lowering to the edge dialect, of a delegate by its name."""

import pytest
import torch
from torch import nn

import quantflow as qf


def test_unknown_delegate():
    with pytest.raises(qf.QuantflowError, match="abacus"):
        qf.export(nn.Linear(3, 2), (torch.randn(1, 3),)).to_core_aten().to_edge("abacus")
