"""AdaRound by blocks: none errs more at its ends, and errors that cancel are found."""

import copy

import pytest
import torch
from block_networks import NETWORKS, calibrated, values_of
from networks import sqnr
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.observers.observation import qparams_of
from quantflow.ptq import adaround, output_gradients
from quantflow.ptq.adaptive_rounding import block
from quantflow.ptq.adaptive_rounding.blocks import blocks
from quantflow.simulation.float_weights import attribute, float_weight, with_float_weights
from quantflow.simulation.network import outputs
from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import DYNAMIC_INT8, INT8, W4A8, Scheme, XNNPACKQuantizer

pytestmark = pytest.mark.slow


def end_errors(graph, rounded, sample):
    """Squared errors of ``rounded`` against the float network that ``graph`` is, by end of its only block and batch."""
    (block, *_) = blocks(graph, quantized_layers(graph), 99)
    names = [node.name for node in block.ends]
    errors = []
    for batch in sample.batches():
        found, wanted = values_of(rounded, batch, True), values_of(graph, batch, False)
        (y, want) = ({n.name: x for n, x in values.items()} for values in (found, wanted))
        errors.append(torch.stack([(y[n] - want[n]).square().sum() for n in names]))
    return torch.stack(errors)


DYNAMIC_W4A8 = Scheme(activation=DYNAMIC_INT8.activation, weight=W4A8.weight)
SCHEMES = {"4 bits": W4A8, "8 bits": INT8, "dynamic": DYNAMIC_INT8, "dynamic, 4 bits": DYNAMIC_W4A8}


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")  # of what stays
@pytest.mark.parametrize("iterations", [1, 100])  # one throws weights about
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("chain", "4 bits"),
        ("chain", "dynamic"),
        ("chain", "dynamic, 4 bits"),
        ("residual", "4 bits"),
        ("residual", "8 bits"),
        ("two in, two out", "4 bits"),
        ("no cut", "4 bits"),
    ],
)
def test_no_block_errs_more_at_an_end_and_weights_stay_on_their_grid(name, scheme, iterations):
    model, inputs, _ = NETWORKS[name]
    sample = qf.Sample()
    graph = calibrated(model, inputs, SCHEMES[scheme], sample)
    state = copy.deepcopy(graph.state_dict())
    dice = torch.get_rng_state()
    rounded = adaround(graph, sample, together=99, iterations=iterations, progress=False)
    assert torch.equal(dice, torch.get_rng_state())
    assert all(torch.equal(x, state[k]) for k, x in graph.state_dict().items())
    with torch.no_grad():
        before, after = end_errors(graph, graph, sample), end_errors(graph, rounded, sample)
    for part in (slice(None), slice(3 * len(before) // 4, None)):
        assert (after[part].sum(0) <= before[part].sum(0) * (1 + 1e-5) + 1e-9).all()
    # (Weights of 8 bits leave nothing to learn where each row has a range of its own.)
    if iterations > 1 and name in ("chain", "two in, two out") and scheme != "dynamic":
        assert (after.sum(0) / before.sum(0)).mean() < 0.8
    for layer in quantized_layers(rounded).values():
        weight = attribute(rounded, layer.weight.args[0])
        scale, zero_point = (q.reshape(-1, *[1] * (weight.ndim - 1)) for q in qparams_of(layer.observer))
        floats = float_weight(layer.weight.args[0], weight) / scale + zero_point
        integers = weight / scale + zero_point
        if torch.equal(floats, integers):
            continue  # it kept what it had
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
        limits = layer.observer.quant_min, layer.observer.quant_max
        assert ((integers - floats.clamp(*limits)).abs() <= 1 + 1e-3).all()
    converted = qf.convert(rounded)
    simulated = torch.cat([y.flatten() for y in outputs(rounded, [inputs], integers=True)[0]])
    with torch.no_grad():
        found = torch.cat([y.flatten() for y in torch.utils._pytree.tree_leaves(converted(*inputs))])
    torch.testing.assert_close(found, simulated, rtol=1e-4, atol=1e-4)


def test_errors_that_cancel_are_found_where_no_layer_sees_them():
    """Hidden numbers that all err least rounded down, and a layer that can but add their errors up."""
    first, second = nn.Linear(3, 24, bias=False), nn.Linear(24, 4, bias=False)
    model, x = nn.Sequential(first, nn.ReLU(), second), torch.rand(600, 3) + 0.5
    x[:, 2] = 0  # the weight that sets the range, half a step above the greatest integer, is of no account
    with torch.no_grad():
        first.weight.copy_(
            torch.stack([torch.full((24,), 7.0), torch.linspace(3.2, 3.45, 24), torch.full((24,), 7.5)], 1)
        )
        second.weight.fill_(1)
    seen, unseen = x.split(300)
    sample = qf.Sample(300)
    exported = qf.export(model, (seen,), dynamic_batch=True).module()
    graph = qf.prepare(exported, XNNPACKQuantizer(W4A8, overrides={"2": Scheme()}))
    qf.calibrate(graph, [seen], sample=sample, progress=False)
    with pytest.warns(qf.QuantflowWarning, match="2 .linear_1.: .*quantized exactly already"):
        single, blocks_at_once = (adaround(graph, sample, together=n, iterations=200, progress=False) for n in (1, 2))
    with torch.no_grad():
        found = [outputs(g, [(unseen,)], integers=True)[0][0] for g in (graph, single, blocks_at_once)]
        nearest, by_layer, by_block = (sqnr(model(unseen), y) for y in found)
    assert by_layer < nearest + 3
    assert by_block > by_layer + 12


def test_one_layer_together_is_layer_by_layer_and_the_same_twice():
    model, inputs, _ = NETWORKS["chain"]
    sample = qf.Sample()
    graph = calibrated(model, inputs, W4A8, sample)
    plain, one, two, again = (
        adaround(graph, sample, iterations=40, progress=False, **given)
        for given in ({}, {"together": 1}, {"together": 2}, {"together": 2})
    )
    for first, second in ((plain, one), (two, again)):
        assert all(torch.equal(x, second.state_dict()[k]) for k, x in first.state_dict().items())
    assert any(not torch.equal(x, one.state_dict()[k]) for k, x in two.state_dict().items())


def test_a_graph_that_stock_torchao_prepared_passes_compose_and_memory_of_the_float_network_stays():
    model, inputs, _ = NETWORKS["residual"]
    prepared = prepare_pt2e(torch.export.export(model.eval(), inputs).module(), XNNPACKQuantizer(W4A8))
    qf.calibrate(prepared, [inputs], progress=False)
    rounded = adaround(prepared, [inputs], together=3, iterations=100, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(with_float_weights(rounded)(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    with pytest.warns(qf.QuantflowWarning, match="quantized exactly already"):
        twice = adaround(rounded, [inputs], together=3, iterations=100, progress=False)
    assert all(torch.equal(x, twice.state_dict()[k]) for k, x in rounded.state_dict().items())


class Halves(nn.Module):
    """Convolutions with a skip, of whose places the head reads but the left half."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(x[..., :4].mean((2, 3)))


def _left_errors(seed):
    """The error of the places that the head reads, with and without their gradients; None where no rounding is found."""
    torch.manual_seed(seed)
    mixing = torch.randn(2, 8, 8) * torch.tensor([1, 3]).reshape(2, 1, 1)  # of channels, another in each half
    left, right = (torch.einsum("oc,nchw->nohw", m, torch.randn(64, 8, 4, 4)) for m in mixing)
    sample, x = qf.Sample(64), torch.cat([left, right], 3)
    graph = calibrated(Halves(), (x,), W4A8, sample)
    gradients = output_gradients(graph, sample.batches(), progress=False)
    end = blocks(graph, quantized_layers(graph), 2)[0].ends[0].name

    def error(gradients):
        rounded = adaround(graph, sample, gradients, together=2, iterations=200, progress=False)
        with torch.no_grad():
            found, wanted = (
                {node.name: y for node, y in values_of(g, (x,), i).items()}[end] for g, i in ((rounded, 1), (graph, 0))
            )
        return float((found - wanted)[..., :4].square().mean() / wanted[..., :4].square().mean())

    try:
        return error(gradients), error(None)
    except qf.QuantflowWarning as warning:
        if "no rounding was found" not in str(warning):
            raise
        return None


def test_places_count_by_their_prices():
    # Learned rounding ends in another place on another processor: one network alone tells little.
    learned = [errors for errors in map(_left_errors, range(8)) if errors is not None]
    priced, unpriced = zip(*learned, strict=True)
    assert len(learned) >= 4
    assert sum(priced) < 0.9 * sum(unpriced)


class Writes(nn.Module):
    """Writes into a part of what is read whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        angle = torch.cos(x)
        angle[:, :4].zero_()
        return torch.atan2(self.b(x), angle)


@torch.library.custom_op("test_block_rounding::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class NoGradient(nn.Module):
    def forward(self, x):
        return doubled(x)


CASES = {  # words of the warning: model
    "too large for memory": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
    "writes in place": Writes(),
    "no gradient": nn.Sequential(nn.Linear(8, 16), NoGradient(), nn.Linear(16, 8)),
    "too few elements": nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)),
}


@pytest.mark.parametrize("words", CASES)
def test_what_is_no_block_is_named_and_learned_layer_by_layer(words, monkeypatch):
    if words == "too large for memory":
        monkeypatch.setattr(block, "MEMORY", 1)
    sample = qf.Sample()
    graph = calibrated(CASES[words], (NETWORKS["chain"][1][0],), W4A8, sample)
    with pytest.warns(qf.QuantflowWarning, match=rf"linear\).*linear_1\).*{words}.*one by one"):
        found = adaround(graph, sample, together=2, iterations=20, progress=False)
    single = adaround(graph, sample, iterations=20, progress=False)
    assert all(torch.equal(y, single.state_dict()[k]) for k, y in found.state_dict().items())
    assert any(not torch.equal(y, graph.state_dict()[k]) for k, y in found.state_dict().items())


def test_a_block_that_does_not_get_better_keeps_what_it_had_and_is_named():
    model, inputs, _ = NETWORKS["chain"]
    graph = calibrated(model, inputs)
    with pytest.warns(qf.QuantflowWarning, match=r"0 \(linear\), 2 \(linear_1\).*reduces their block"):
        kept = adaround(graph, [inputs], together=5, iterations=1, progress=False)
    assert all(torch.equal(x, graph.state_dict()[k]) for k, x in kept.state_dict().items())


def test_bad_input_names_stage_and_remedy():
    graph = calibrated(nn.Linear(8, 8), (NETWORKS["chain"][1][0],))
    with pytest.raises(qf.QuantflowError, match="0 layers") as raised:
        adaround(graph, NETWORKS["chain"][1], together=0, progress=False)
    assert raised.value.stage == "adaround"
    assert raised.value.remedy
