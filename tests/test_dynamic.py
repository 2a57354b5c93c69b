"""Dynamic schemes: one range for each row, chosen at run time, and what else reads the tensors they are chosen for."""

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.graph.parameters import is_constant
from quantflow.metrics import signal_to_noise as sqnr
from quantflow.observers.observation import observer_of
from quantizers import DYNAMIC_INT8, DYNAMIC_W4, INT8, XNNPACKQuantizer

DYNAMIC = pytest.mark.parametrize("scheme", [DYNAMIC_INT8, DYNAMIC_W4], ids=str)


class PostNorm(nn.Module):
    """The feed-forward half of a post-norm transformer layer: a dropout whose value a linear layer and the residual read."""

    def __init__(self, width=32):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.drop(x)
        return self.norm(x + self.drop(self.second(torch.relu(self.first(x)))))


def prepare(model, x, quantizer, **given):
    prepared = qf.prepare(qf.export(model, (x,)).module(), quantizer, **given)
    return qf.calibrate(prepared, [x], progress=False)


def lower(graph, x, delegate="xnnpack"):
    return qf.export(graph, (x,)).to_core_aten().to_edge(delegate).to_executorch(strict=True)


def observed(prepared):
    """The activations that are observed, and who reads them so."""
    calls = [n for n in prepared.graph.nodes if observer_of(n, prepared) is not None and not is_constant(n.args[0])]
    return [(call.args[0].name, sorted(user.name for user in call.users)) for call in calls]


@DYNAMIC
def test_a_post_norm_transformer(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), PostNorm()).eval()
    x = torch.randn(2, 7, 32)
    converted = qf.convert(prepare(model, x, XNNPACKQuantizer(scheme)))
    program = lower(converted, x)
    assert sqnr(converted(x).detach(), program(x)) > 35
    assert sqnr(model(x).detach(), program(x)) > (30 if scheme is DYNAMIC_INT8 else 12)


@pytest.mark.parametrize("scheme", [INT8, DYNAMIC_INT8, DYNAMIC_W4], ids=str)
def test_a_residual_behind_a_dropout_is_not_quantized_unasked(scheme):
    """The dropout's value is read by a layer in integers and by a sum in float: only the layer's is on a grid."""
    model, x = PostNorm().eval(), torch.randn(2, 7, 32)
    prepared = prepare(model, x, XNNPACKQuantizer(None, overrides={"first": scheme}))
    assert ("dropout", ["linear"]) in observed(prepared)
    assert all(reader == ["linear"] for name, reader in observed(prepared) if name in ("x", "dropout"))
    converted = qf.convert(prepared)
    add = next(n for n in converted.graph.nodes if n.name == "add")
    assert add.args[0].op == "placeholder"
    expected = converted(x).detach()
    assert sqnr(expected, lower(converted, x)(x)) > 35


def test_where_all_readers_of_a_dropout_agree_integers_meet_them():
    """Then one grid before the dropout serves all, and no further one is needed behind it."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.before = nn.Dropout(0.1), nn.Linear(8, 8)
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.drop(self.drop(self.before(x)))
            return self.left(x) + self.right(x)

    x = torch.randn(3, 8)
    prepared = prepare(Branches().eval(), x, XNNPACKQuantizer())
    assert ("linear", ["dropout"]) in observed(prepared)
    assert not [name for name, _ in observed(prepared) if name.startswith("dropout")]


def test_a_dropout_behind_integers_takes_their_grid_though_a_float_operator_reads_it():
    """What a layer in integers puts out lies on its grid for all readers: another behind the dropout would round twice."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.before, self.after = nn.Dropout(0.1), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.drop(self.before(x))
            return self.after(x), x.sin()

    x = torch.randn(3, 8)
    prepared = prepare(Split().eval(), x, XNNPACKQuantizer())
    assert not [name for name, _ in observed(prepared) if name.startswith("dropout")]
