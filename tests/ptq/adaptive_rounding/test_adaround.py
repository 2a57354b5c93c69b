"""AdaRound: no output of a layer errs more, every weight is at one of its two integers, a planted loss is won back."""

import pytest
import torch
from networks import sqnr
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.graph.aten import clamp_limits
from quantflow.observers.observation import qparams_of
from quantflow.ptq import adaround, reconstruct_weights
from quantflow.ptq.adaptive_rounding.learned_rounding import Rows, learn_rounding
from quantflow.ptq.adaptive_rounding.soft_rounding import SoftRounding
from quantflow.simulation.float_weights import attribute, float_weight, with_float_weights
from quantflow.simulation.interpreter import evaluate
from quantflow.simulation.network import outputs
from quantflow.simulation.paired_interpreter import run_paired
from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import INT8, W4A8, Scheme, TensorScheme, XNNPACKQuantizer

PER_TENSOR = Scheme(weight=TensorScheme(bits=4))


def calibrated(model, data, scheme=W4A8):
    graph = qf.export(model.eval(), (data[:2],), dynamic_batch=True).module()
    return qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(scheme)), [data], progress=False)


def layer_errors(graph, x):
    """The squared error of each output of the one layer, behind its clamp."""
    stop = next(run_paired(graph, [(x,)], quantized_layers(graph), title="", progress=False))
    node = stop.layer.node
    found, wanted = evaluate(node, stop.integers[0]), stop.floats[0][node]
    limits = clamp_limits(next(iter(node.users))) or (-torch.inf, torch.inf)
    error = found.clamp(*limits) - wanted.clamp(*limits)
    return error.movedim(stop.layer.channel_axis, -1).flatten(0, -2).square().mean(0)


IMAGES, ROWS = torch.randn(4, 4, 8, 8).cumsum(2) + 0.5, torch.randn(128, 16) @ torch.randn(16, 16)
LAYERS = {
    "conv": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU6()), IMAGES),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.ReLU()), IMAGES),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGES),
    "conv1d": (nn.Conv1d(4, 5, 3, stride=2), IMAGES.flatten(2)),
    "linear": (nn.Linear(16, 8), ROWS),
    "linear, no bias": (nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU()), ROWS),
}


@pytest.mark.parametrize("scheme", [INT8, W4A8, PER_TENSOR], ids=["8 bits", "4 bits", "4 bits per tensor"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_output_errs_more_and_weights_stay_on_their_grid(name, scheme):
    model, x = LAYERS[name]
    if scheme is PER_TENSOR:  # a backend's quantizer may refuse it; the pass may not
        graph = qf.export(model.eval(), (x[:2],), dynamic_batch=True).module()
        graph = qf.calibrate(qf.prepare(graph, _per_tensor()), [x], progress=False)
    else:
        graph = calibrated(model, x, scheme)
    rounded = adaround(graph, [x], iterations=60, progress=False)
    before, after = layer_errors(graph, x), layer_errors(rounded, x)
    assert (after <= before * (1 + 1e-5) + 1e-12).all()
    if scheme is not INT8:
        assert after.sum() < 0.9 * before.sum()
    (layer,) = quantized_layers(rounded).values()
    weight = attribute(rounded, layer.weight.args[0])
    scale, zero_point = (q.reshape(-1, *[1] * (weight.ndim - 1)) for q in qparams_of(layer.observer))
    position = weight / scale
    limits = layer.observer.quant_min, layer.observer.quant_max
    torch.testing.assert_close(position, position.round(), rtol=0, atol=1e-3)
    integers = position.round() + zero_point
    assert integers.min() >= limits[0]
    assert integers.max() <= limits[1]
    floats = float_weight(layer.weight.args[0], weight) / scale + zero_point
    assert ((integers - floats.clamp(*limits)).abs() <= 1 + 1e-3).all()
    assert torch.equal(float_weight(layer.weight.args[0], weight), next(model.parameters()))
    ((simulated,),) = outputs(rounded, [(x,)], integers=True)
    torch.testing.assert_close(qf.convert(rounded)(x), simulated, rtol=1e-4, atol=1e-4)


def _per_tensor():
    from quantflow.graph.aten import aten
    from quantizers import Rule, RuleQuantizer

    layers = {aten.conv1d.default, aten.conv2d.default, aten.linear.default}
    clamps = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default})
    return RuleQuantizer(PER_TENSOR, rules=(Rule("layer", frozenset(layers), weight="weight", clamps=clamps),))


def test_a_planted_loss_is_won_back_on_data_not_seen():
    """Inputs of one sign and weights that all round down: nearest rounding adds its errors up."""
    layer, x = nn.Linear(32, 6), torch.rand(600, 32) + 1
    with torch.no_grad():
        integers = torch.randint(-6, 6, layer.weight.shape)
        integers[:, 0] = 7
        layer.weight.copy_((integers + 0.4 * (integers < 7)) / 7)
    seen, unseen = x.split(300)
    graph = calibrated(layer, seen)
    rounded = adaround(graph, [seen], progress=False)
    with torch.no_grad():
        ((before,),), ((after,),) = (outputs(g, [(unseen,)], integers=True) for g in (graph, rounded))
        assert sqnr(layer(unseen), after) > sqnr(layer(unseen), before) + 12


def test_rows_count_by_their_weights():
    mixing = torch.randn(2, 6, 6)
    x = (torch.randn(2, 100, 6) @ mixing).reshape(1, 200, 6)
    weight = torch.randn(1, 64, 6)
    scale, none = weight.abs().amax(2, keepdim=True) / 7, torch.zeros(1, 1, 64)
    counts = torch.tensor([1.0, 0.0]).repeat_interleave(100)[None]
    plain, counted = (
        Rows(x, x @ weight.transpose(1, 2), weights, none, (-torch.inf, torch.inf))
        for weights in (torch.ones(1, 200), counts)
    )
    nearest = (weight / scale).round() * scale
    alike, told = (
        counted.error(
            learn_rounding(SoftRounding(weight, scale, torch.zeros_like(scale), -7, 7), rows, iterations=200)
        ).sum()
        for rows in (plain, counted)
    )
    assert told < 0.8 * alike < 0.8 * counted.error(nearest).sum()


def test_it_takes_a_graph_that_stock_torchao_prepared_and_leaves_it_as_it_was():
    model, x = LAYERS["conv"]
    prepared = prepare_pt2e(torch.export.export(model.eval(), (x,)).module(), XNNPACKQuantizer(W4A8))
    qf.calibrate(prepared, [x], progress=False)
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    rounded = adaround(prepared, [x], iterations=60, progress=False)
    assert layer_errors(rounded, x).sum() < layer_errors(prepared, x).sum()
    assert all(torch.equal(before[k], v) for k, v in prepared.state_dict().items())


def test_passes_compose_and_measure_against_the_float_network():
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)), ROWS
    graph = calibrated(model, x)
    rounded = adaround(graph, [x], iterations=60, progress=False)
    fitted = reconstruct_weights(rounded, [(part,) for part in x.split(32)], progress=False)
    before = with_float_weights(fitted)
    assert all(torch.equal(before.state_dict()[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(before(x), model(x))
        sample = qf.Sample()
        qf.calibrate(rounded, [x], sample=sample, progress=False)
        every = min(8, len(sample.batches()))
        held_out = sample.batches()[every - 1 :: every]
        wanted, found = (
            torch.cat([o[0] for o in outputs(g, held_out, integers=i)]) for g, i in ((graph, 0), (rounded, 1))
        )
    recovered = qf.recover(rounded, sample, progress=False)
    assert recovered.steps[0].sqnr == pytest.approx(sqnr(wanted, found), abs=0.01)


def test_weights_on_their_grid_already_are_named():
    x = ROWS
    graph = reconstruct_weights(
        calibrated(nn.Sequential(nn.Linear(16, 8)), x), [(part,) for part in x.split(100)], progress=False
    )
    with pytest.warns(qf.QuantflowWarning, match="before reconstruct_weights") as warned:
        adaround(graph, [x], progress=False)
    assert "0 (linear)" in str(warned[0].message)


def test_bad_input_names_stage_and_remedy():
    x = torch.randn(8, 4)
    graph = qf.export(nn.Linear(4, 4), (x,), dynamic_batch=True).module()
    ready = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    for bad, data, iterations, words in (
        (graph, [x], 10, "not prepared"),
        (qf.prepare(graph, XNNPACKQuantizer()), [x], 10, "not calibrated"),
        (qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], 10, "training"),
        (ready, [], 10, "no data"),
        (ready, [torch.randn(8, 5)], 10, "shape"),
        (ready, [x], 0, "0 steps"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            adaround(bad, data, iterations=iterations, progress=False)
        assert raised.value.stage == "adaround"
        assert raised.value.remedy
