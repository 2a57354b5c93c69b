"""Layers whose training behavior a capture in inference mode loses are named."""

import pytest
import torch
from networks import Behind, ConvNet
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth
from training_data import X

import quantflow as qf
from quantizers import XNNPACKQuantizer


class DropsItsBranch(nn.Module):
    """Stochastic depth, an auxiliary head, and dropout of a kind that nodes do hold."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
        self.depth, self.off = StochasticDepth(0.2, "row"), StochasticDepth(0.0, "row")

    def forward(self, x):
        x = F.dropout(x + self.off(self.depth(self.stem(x))), 0.1, training=self.training)
        return self.head(x)


class Renamed(StochasticDepth):
    """Its forward is that of its base."""


class Checkpointed(nn.Module):
    """A base whose branch computes the same."""

    gradient_checkpointing = False

    def __call__(self, *args):
        if self.gradient_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(super().__call__, *args)
        return super().__call__(*args)


class Plain(Checkpointed):
    def forward(self, x):
        return x * 2


class Widened(nn.MultiheadAttention):
    """Branches on its own, besides what attention does."""

    def forward(self, x):
        return x * 2 if self.training else super().forward(x, x, x)[0]


class DropsInBranches(DropsItsBranch):
    """The layer and the network are both subclasses, and a class of torch.nn is one's base."""

    def __init__(self):
        super().__init__()
        self.depth, self.attention = Renamed(0.2, "row"), Widened(4, 1)
        self.plain = Plain()

    def forward(self, x):
        return super().forward(self.plain(self.attention(x)))


def test_subclasses_that_train_as_in_inference_are_named():
    found = qf.export(DropsInBranches(), (torch.randn(8, 4),)).inference_only
    assert found == ("depth (Renamed)", "attention (Widened)")
    parametrized = DropsItsBranch()
    torch.nn.utils.parametrizations.weight_norm(parametrized.stem)
    assert qf.export(parametrized, (torch.randn(8, 4),)).inference_only == ("depth (StochasticDepth)",)


def test_a_layer_is_switched_off_where_all_its_switches_are():
    model = DropsItsBranch()
    model.depth.drop_prob = 0.0
    assert qf.export(model, (torch.randn(8, 4),)).inference_only == ("depth (StochasticDepth)",)
    model.depth.p = 0.0
    assert qf.export(model, (torch.randn(8, 4),)).inference_only == ()


def test_layers_that_train_as_in_inference_are_named():
    exported = qf.export(DropsItsBranch(), (torch.randn(8, 4),))
    assert exported.inference_only == ("depth (StochasticDepth)",)
    again = qf.export(exported.module(), (torch.randn(8, 4),)).module()
    batch = (torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    with pytest.warns(qf.QuantflowWarning, match=r"depth \(StochasticDepth\)"):
        qf.train(qf.prepare(again, XNNPACKQuantizer(), qat=True), [batch], progress=False)
    assert qf.export(ConvNet(), (X[:2],)).inference_only == ()


def test_a_parameter_called_p_is_no_probability():
    class Named(Behind):
        def __init__(self):
            super().__init__(torch.relu)
            self.p = nn.Parameter(torch.ones(4))

    assert qf.export(Named(), (torch.randn(2, 4, 8, 8),)).inference_only == ()
