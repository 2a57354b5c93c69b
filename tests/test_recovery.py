"""Recovery: laws of its pieces, and that the whole helps on data that it was not fitted to."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import ConvNet, randomize_statistics
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.observers.observation import observers_of
from quantflow.ptq import optimize_ranges, reconstruct_weights
from quantflow.ptq.weight_reconstruction.gptq import output_error, round_weights
from quantflow.ptq.weight_reconstruction.least_squares import correction
from quantflow.ptq.weight_reconstruction.moments import Moments
from quantflow.signature.signature import DynamicDim, Input, Signature
from quantflow.simulation.network import outputs
from quantflow.simulation.output_gradients import output_gradients
from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import DYNAMIC_INT8, W4A8, XNNPACKQuantizer


def calibrated(model, example, data, quantizer=None, dynamic_batch=True):
    graph = qf.export(model.eval(), example, dynamic_batch=dynamic_batch).module()
    prepared = qf.prepare(graph, quantizer or XNNPACKQuantizer())
    return qf.calibrate(prepared, data, progress=False)


def sqnr(graph, batches):
    with torch.no_grad():
        reference = torch.cat([o[0].flatten() for o in outputs(graph, batches, integers=False)])
        found = torch.cat([o[0].flatten() for o in outputs(graph, batches, integers=True)])
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


LAYERS = [
    (nn.Conv2d(3, 4, 3), (2, 3, 7, 8)),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2), (2, 4, 7, 5)),
    (nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=4, bias=False), (3, 4, 6, 6)),
    (nn.Conv1d(3, 5, 3, padding=1), (2, 3, 9)),
    (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3, bias=False), (2, 6, 5)),
]


def test_a_sample_goes_on_from_its_state():
    graph = qf.export(nn.Linear(3, 2), (torch.randn(1, 3),), dynamic_batch=True).module()
    signature = Signature.of_graph(graph)
    batches = [torch.randn(5, 3) for _ in range(8)]
    whole, before, after = qf.Sample(7), qf.Sample(7), qf.Sample()
    for i, x in enumerate(batches):
        whole.add([x], signature)
        if i == 4:
            after.load_state_dict(before.state_dict())
        (before if i < 4 else after).add([x], signature)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(whole.batches(), after.batches(), strict=True))
    with pytest.raises(qf.QuantflowError, match="not the state of a sample"):
        after.load_state_dict({"weight": torch.zeros(3)})


def test_a_sample_keeps_what_a_loader_writes_over():
    signature = Signature((Input("x", "float32", (2, 3)),))
    dynamic = Signature((Input("x", "float32", (DynamicDim("batch", 1, None), 3)), Input("table", "float32", (4,))))
    buffer, table, whole, cut = torch.zeros(2, 3), torch.zeros(4), qf.Sample(8), qf.Sample(8)
    for step in range(3):
        buffer.fill_(step)
        table.fill_(step // 2)
        whole.add([buffer], signature)
        cut.add([buffer, table], dynamic)
    assert sorted(x[0, 0].item() for (x,) in whole.batches()) == [0, 1, 2]
    found = {table[0].item(): sorted(x[:, 0].tolist()) for x, table in cut.batches()}
    assert found == {0: [0, 0, 1, 1], 1: [2, 2]}  # examples that share an input form batches


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


def test_the_walk_says_what_eager_and_what_the_converted_graph_say():
    x = torch.randn(6, 3, 16, 16)
    model = ConvNet()
    randomize_statistics(model)
    graph = calibrated(model, (x[:1],), [x])
    with torch.no_grad():
        (floats,) = outputs(graph, [(x,)], integers=False)
        (integers,) = outputs(graph, [(x,)], integers=True)
        torch.testing.assert_close(floats[0], model.eval()(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(integers[0], qf.convert(graph)(x), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 24), st.sampled_from([2, 4, 8]))
def test_gptq_never_errs_more_than_nearest_rounding(seed, groups, features, bits):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 60, features, generator=random, dtype=torch.float64)
    x = x @ torch.randn(groups, features, features, generator=random, dtype=torch.float64)
    weight = torch.randn(groups, 3, features, generator=random, dtype=torch.float64)
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(2, keepdim=True).clamp(min=1e-6) / top
    covariance = x.transpose(1, 2) @ x / 60
    found = round_weights(weight, covariance, scale, torch.zeros_like(scale), -top, top)
    nearest = (weight / scale).round() * scale
    assert (output_error(found - weight, covariance) <= output_error(nearest - weight, covariance) * (1 + 1e-9)).all()
    integers = found / scale
    assert torch.allclose(integers, integers.round(), atol=1e-6)
    assert integers.abs().max() <= top + 1e-6


def _moments(x, r):
    return Moments.of(x, r, torch.ones(x.shape[:2]), x.mean(1, keepdim=True))


def test_the_correction_finds_a_planted_map_and_nothing_in_noise():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4000, 6, generator=random) + 3
    planted = torch.randn(2, 4, 6, generator=random)
    halves = [
        _moments(x[:, part], x[:, part] @ planted.transpose(1, 2)) for part in (slice(0, 2000), slice(2000, None))
    ]
    torch.testing.assert_close(correction(*halves).float(), planted, rtol=1e-2, atol=1e-2)
    noise = torch.randn(2, 4000, 4, generator=random)
    halves = [_moments(x[:, part], noise[:, part]) for part in (slice(0, 2000), slice(2000, None))]
    assert correction(*halves).abs().max() < 0.05


def test_moments_do_not_depend_on_batching_or_on_the_shift():
    x, r = torch.randn(1, 90, 5).double() + 100, torch.randn(1, 90, 2).double()
    weights = torch.rand(1, 90).double()
    whole = Moments.of(x, r, weights, x[:, :1])
    parts = [Moments.of(x[:, s], r[:, s], weights[:, s], x[:, 5:6]) for s in (slice(0, 20), slice(20, 90))]
    joined = parts[0] + parts[1]
    for name in ("mean_x", "mean_r", "covariance", "cross_covariance"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))


class Capped(nn.Module):
    """Outputs that depend on the activation up to ``cap`` only, but for ``leak`` of it."""

    def __init__(self, leak):
        super().__init__()
        self.linear, self.head, self.leak = nn.Linear(8, 8), nn.Linear(8, 4), leak

    def forward(self, x):
        y = self.linear(x)
        return self.head(y.clamp(-1, 1) + self.leak * y)


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_a_range_spends_no_levels_on_what_no_output_depends_on(leak):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    x[::8] *= 12
    quantizer = XNNPACKQuantizer(skip=[lambda node: "clamp" in node.name or "add" in node.name or "mul" in node.name])
    graph = calibrated(Capped(leak), (x,), [x], quantizer)
    name, observer = next((n, o) for n, o in observers_of(graph).items() if n.endswith("linear"))
    found = observers_of(optimize_ranges(graph, output_gradients(graph, [(x,)], progress=False)))[name]
    width = float(found.scale) * 255
    full = float(observer.max_val - observer.min_val)
    assert width < full / 4 if leak == 0 else width > full / 2


def test_compensation_removes_the_mean_error_and_lowers_the_error_of_a_layer():
    torch.manual_seed(1)
    x = torch.randn(512, 16) @ torch.randn(16, 16) + 2
    graph = calibrated(nn.Linear(16, 8), (x[:8],), [x], XNNPACKQuantizer(W4A8))
    batches = [(part,) for part in x.split(64)]
    found = reconstruct_weights(graph, batches, progress=False)
    with torch.no_grad():
        reference = torch.cat([o[0] for o in outputs(graph, batches, integers=False)])
        before, after = (torch.cat([o[0] for o in outputs(g, batches, integers=True)]) for g in (graph, found))
    # The output's own rounding is the observer's after the layer; the mean is right to a part of its step.
    assert (after - reference).mean(0).abs().max() < 0.2 * (before - reference).mean(0).abs().max()
    assert sqnr(found, batches) > sqnr(graph, batches) + 3
    converted = qf.convert(found)
    assert torch.allclose(converted(x), after, atol=1e-4)


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
    assert "ranges by their effect" in str(result) or scheme is DYNAMIC_INT8
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


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 40))
def test_a_sample_is_of_the_data_and_no_larger_than_asked(total, batch, examples):
    x = torch.arange(total, dtype=torch.float32).reshape(total, 1)
    sample = qf.Sample(examples)
    for part in x.split(batch):
        sample.add((part,), Signature((Input("x", "float32", (DynamicDim("batch", 1, None), 1)),)))
    values = torch.cat([b[0] for b in sample.batches()]).flatten().tolist()
    assert len(values) == len(set(values)) == min(total, examples)
    assert all(len(b[0]) <= 8 for b in sample.batches())


def test_bad_input_names_stage_and_remedy():
    x = torch.randn(8, 4)
    graph = qf.export(nn.Linear(4, 4), (x,), dynamic_batch=True).module()
    for bad, data, words in (
        (graph, [x], "not prepared"),
        (qf.prepare(graph, XNNPACKQuantizer()), [x], "not calibrated"),
        (qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], "training"),
        (calibrated(nn.Linear(4, 4), (x,), [x]), [], "no data"),
        (calibrated(nn.Linear(4, 4), (x,), [x]), [torch.randn(8, 5)], "shape"),
        (calibrated(nn.Linear(4, 4), (x,), [x]), qf.Sample(), "no data"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            qf.recover(bad, data, progress=False)
        assert raised.value.stage == "recover"
        assert raised.value.remedy


def test_a_dead_feature_and_a_dead_group_are_no_trouble():
    x = torch.zeros(2, 50, 4)
    x[0, :, 1:] = torch.randn(50, 3)
    r = torch.randn(2, 50, 3)
    weights = torch.ones(2, 50)
    weights[1] = 0
    halves = [Moments.of(x[:, s], r[:, s], weights[:, s], x[:, :1]) for s in (slice(0, 25), slice(25, 50))]
    assert correction(*halves).isfinite().all()
    weight = torch.randn(2, 3, 4).double()
    step = torch.full((2, 3, 1), 0.1).double()
    rounded = round_weights(weight, sum(halves[1:], halves[0]).covariance, step, torch.zeros_like(step), -127, 127)
    assert rounded.isfinite().all()
    torch.testing.assert_close(rounded[1], (weight[1] / 0.1).round() * 0.1)
