"""What follows the training mode of the model is found, and what can not switch stays off and is named."""

import copy

import pytest
import torch
from dropout_networks import Around, Residual, Telling
from torch import nn
from torch.nn import functional as F

import quantflow as qf


class ResidualWithoutGradients(Residual):
    def forward(self, x):
        with torch.no_grad():
            x = super().forward(x)
        return self.linear(x)


@pytest.mark.parametrize("kind", [Residual, ResidualWithoutGradients])
def test_a_dropout_that_a_capture_elsewhere_has_mixed_up_stays_off_and_is_told(kind):
    torch.manual_seed(0)
    model, x = kind(nn.Dropout(0.4)).eval(), torch.randn(8, 6)
    exported = qf.export(torch.export.export(model, (x,)))
    assert exported.inference_only == ("drop (dropout)",)
    graph = exported.module()
    assert torch.allclose(graph.train()(x), model(x), atol=1e-6)
    with pytest.warns(qf.QuantflowWarning, match="drop"):
        qf.train(graph, [(x, torch.zeros(8, dtype=torch.long))], progress=False)


class BranchesWhileItTrains(Telling):
    """What is captured in inference mode only."""

    def forward(self, x):
        if self.training and x.sum() > 100:
            x = x / 2
        return super().forward(x)


def test_a_mode_that_can_not_be_told_is_followed_and_named():
    torch.manual_seed(0)
    model, x = BranchesWhileItTrains(), torch.randn(4, 5, 6)
    exported = qf.export(model, (x,))
    assert sum("unknown mode" in name for name in exported.inference_only) == 3
    again = qf.export(exported.module(), (x,))
    assert again.inference_only == exported.inference_only
    assert not torch.equal(again.module()(x), again.module()(x))


def test_a_batch_of_one_tells_modes_too():
    model = nn.Sequential(Around(nn.Flatten()), nn.BatchNorm1d(4))
    assert qf.export(model, (torch.randn(1, 4),)).inference_only == ()


class TwoDropouts(nn.Module):
    """A capture elsewhere mixes the first dropout up with its input, and not the second."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        x = F.dropout(x, 0.5, self.training)
        return x * 2 + self.linear(F.dropout(x * 3, 0.25, self.training)) + x


def test_what_stays_off_of_a_program_from_elsewhere_stays_so_alone_in_the_next_capture():
    x = torch.randn(4, 6)
    graph = qf.export(torch.export.export(TwoDropouts().eval(), (x,))).module()
    for captured_again in (graph, qf.export(graph, (x,)).module()):
        drops = captured_again.train().graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
        assert [node.args[1:] for node in drops] == [(0.5, False), (0.25, True)]


class DropsInABranch(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.drop, self.norm, self.linear = nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.cond(x.sum() > 0, lambda x: self.drop(x) * 1.5, lambda x: x * 2, (x,))
        with torch.autocast("cpu", torch.bfloat16):
            x = self.norm(x)
        return self.linear(x)


def test_what_can_not_switch_in_a_region_stays_off_and_is_told():
    model, x = DropsInABranch(None), torch.rand(3, 4, 6)
    for program in (model, torch.export.export(model.eval(), (x,))):
        exported = qf.export(program, (x,))
        told = {name.split(" ")[0] for name in exported.inference_only}
        assert told == ({"dropout", "norm"} if program is model else {"dropout"})
        again = qf.export(exported.module(), (x,))
        assert again.inference_only == exported.inference_only
        if program is model:
            assert torch.equal(again.module().train()(x), model(x))


class MoreWhileItTrains(nn.Module):
    """Another probability while it trains."""

    def forward(self, x):
        return F.dropout(x, 0.5 if self.training else 0.1, training=self.training)


def test_a_call_that_is_another_in_training_is_named():
    assert "dropout in an unknown mode" in str(qf.export(MoreWhileItTrains(), (torch.randn(4, 6),)).inference_only)


class Auxiliary(nn.Module):
    """Keeps a loss of its own in training; ``dropout`` makes its mode one that a second capture tells."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = F.dropout(self.linear(x), 0.5, self.training)
        if self.training:
            self.auxiliary = y.mean()
        return y


def test_export_leaves_what_a_model_holds():
    model = Auxiliary().train()
    held = set(vars(model))
    qf.export(model, (torch.randn(3, 4),))
    assert set(vars(model)) == held
    copy.deepcopy(model)


class OwnTrain(nn.Module):
    """A ``train()`` of its own that computes nothing, beside a buffer that nothing has set."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("unset", torch.full((2,), torch.nan))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_switch_that_computes_nothing_is_not_named(device):
    with torch.device(device):
        assert qf.export(OwnTrain(), (torch.randn(3, 4),)).inference_only == ()
