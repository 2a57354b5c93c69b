"""Recovery helps on data that it was not fitted to, and is safe where it can not."""

import copy

import pytest
import torch
from calibrated import calibrated, sqnr
from networks import ConvNet
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantizers import DYNAMIC_INT8, W4A8, XNNPACKQuantizer


@pytest.fixture(scope="module")
def trained():
    """A small network whose outputs mean something: trained to tell four directions of stripes."""
    torch.manual_seed(0)

    def images(n):
        angle = torch.randint(0, 4, (n,))
        grid = torch.arange(16.0)
        waves = [grid[:, None].expand(16, 16), grid[None].expand(16, 16), grid[:, None] + grid, grid[:, None] - grid]
        phase = torch.rand(n, 1, 1) * 6
        x = torch.stack([waves[a] for a in angle]).mul(0.8).add(phase).sin()[:, None].expand(n, 3, 16, 16)
        return x + 0.4 * torch.randn(n, 3, 16, 16), angle

    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        x, angle = images(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), angle).backward()
        optimizer.step()
    return model.eval(), images(256)[0], images(256)[0]


@pytest.mark.parametrize("scheme", [None, W4A8, DYNAMIC_INT8], ids=["int8", "w4a8", "dynamic"])
def test_recovery_raises_the_sqnr_on_data_it_has_not_seen(trained, scheme):
    model, seen, unseen = trained
    quantizer = XNNPACKQuantizer() if scheme is None else XNNPACKQuantizer(scheme)
    graph = calibrated(model, (seen[:1],), [seen], quantizer)
    before = copy.deepcopy(graph.state_dict())
    result = qf.recover(graph, [seen], progress=False)
    assert sqnr(result.graph, [(unseen,)]) > sqnr(graph, [(unseen,)]) + (3 if scheme is W4A8 else 0)
    kept = [step.sqnr for step in result.steps if step.kept]
    assert kept == sorted(kept)
    assert "range optimization" in str(result) or scheme is DYNAMIC_INT8
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items()), "the graph was to be left as it was"


def test_recovery_takes_a_graph_that_stock_torchao_prepared(trained):
    model, seen, unseen = trained
    prepared = prepare_pt2e(torch.export.export(model, (seen,)).module(), XNNPACKQuantizer())
    qf.calibrate(prepared, [seen], progress=False)
    result = qf.recover(prepared, [seen], progress=False)
    assert len(result.steps) == 3
    assert qf.convert(result.graph)(unseen).shape == (256, 5)


class Heads(nn.Module):
    """Integer and float inputs, several outputs, one of them constant."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.dead = nn.Embedding(10, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        nn.init.zeros_(self.dead.weight)

    def forward(self, tokens, *, scale):
        hidden = torch.tanh(self.embed(tokens).mean(1)) * scale
        return {"a": self.linear(hidden), "b": self.dead(hidden), "tokens": tokens}


def test_recovery_of_several_inputs_and_outputs():
    tokens, scale = torch.randint(0, 10, (40, 5)), torch.rand(40, 1)
    graph = qf.export(Heads().eval(), (tokens,), {"scale": scale}, dynamic_batch=True).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    sample = qf.Sample(24)
    data = [{"tokens": tokens[i : i + 10], "scale": scale[i : i + 10]} for i in range(0, 40, 10)]
    qf.calibrate(prepared, data, sample=sample, progress=False)
    assert len(sample) == 24
    assert sum(len(batch[0]) for batch in sample.batches()) == 24
    result = qf.recover(prepared, sample, progress=False)
    assert result.graph(tokens, scale=scale)["a"].shape == (40, 3)


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.floor(self.first(x)))


def test_recovery_where_no_gradient_comes_through_is_safe():
    x = torch.randn(32, 4)
    graph = calibrated(NoGradient(), (x,), [x])
    assert sqnr(qf.recover(graph, [x], progress=False).graph, [(x,)]) >= sqnr(graph, [(x,)]) - 1


def test_bad_input_names_stage_and_remedy():
    x = torch.randn(8, 4)
    graph = qf.export(nn.Linear(4, 4), (x,), dynamic_batch=True).module()
    for bad, data, words in (
        (graph, [x], "not prepared"),
        (qf.prepare(graph, XNNPACKQuantizer()), [x], "not calibrated"),
        (qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], "not calibrated"),
        (calibrated(nn.Linear(4, 4), (x,), [x]), [], "no data"),
        (calibrated(nn.Linear(4, 4), (x,), [x]), [torch.randn(8, 5)], "shape"),
        (calibrated(nn.Linear(4, 4), (x,), [x]), qf.Sample(), "no data"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            qf.recover(bad, data, progress=False)
        assert raised.value.stage == "recover"
        assert raised.value.remedy


def prepared(model, x):
    graph = qf.export(model.eval(), (x,), dynamic_batch=True).module()
    return graph, qf.prepare(graph, XNNPACKQuantizer())


def test_outputs_of_which_integers_keep_nothing_are_named():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-6
    _, graph = prepared(model, x)
    sample = qf.Sample()
    qf.calibrate(graph, [x], sample=sample, progress=False)
    with pytest.warns(qf.QuantflowWarning, match="keep nothing of the outputs"):
        qf.recover(graph, sample, progress=False)
