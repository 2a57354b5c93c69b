"""4-bit weights in groups: the grid, the runtime, and who is refused."""

import pytest
import torch
from networks import sqnr
from torch import nn

import quantflow as qf
from quantflow.observers import PerGroupMinMaxObserver
from quantflow.ptq import correct_bias
from quantflow.simulation.network import outputs
from quantizers import DYNAMIC_W4, Scheme, TensorScheme, XNNPACKQuantizer

PER_CHANNEL = Scheme(
    activation=TensorScheme(dynamic=True), weight=TensorScheme(bits=4, symmetric=True, per_channel=True)
)


def uneven(inputs=128, outputs=24):
    """A layer whose groups of inputs differ in size, as in language models."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight *= torch.logspace(-1.5, 0, inputs // 32).repeat_interleave(32)
    return layer


def convert(model, x, scheme=DYNAMIC_W4):
    prepared = qf.prepare(qf.export(model.eval(), (x,)).module(), XNNPACKQuantizer(scheme))
    return qf.convert(qf.calibrate(prepared, [x], progress=False))


def test_each_group_is_within_half_a_step():
    layer, x = uneven(), torch.randn(3, 128)
    converted = convert(layer, x)
    integers, scale = converted.get_buffer("weight_quantized"), converted.get_buffer("weight_scale")
    assert integers.dtype == torch.int8
    assert (int(integers.min()), int(integers.max())) == (-7, 7)
    assert scale.shape == (24, 4)
    assert torch.equal(scale, scale.bfloat16().float())
    step = scale.repeat_interleave(32, 1)
    # The scale is rounded to 8 bits, which may leave the largest value a 64th of a step outside.
    assert ((integers * step - layer.weight).abs() <= step * (0.5 + 1 / 64)).all()
    assert "weight" not in converted.state_dict()


def test_runs_in_integers_on_the_runtime():
    model, x = nn.Sequential(uneven(), nn.ReLU(), nn.Linear(24, 32), nn.Linear(32, 5)), torch.randn(1, 128)
    converted = convert(model, x, DYNAMIC_W4)
    assert "24 inputs make no groups of 32" in str(XNNPACKQuantizer(DYNAMIC_W4).plan(qf.export(model, (x,)).module()))
    edge = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack")
    assert (edge.delegation().fraction, edge.delegation().calls) == (1.0, 1)
    program = edge.to_executorch(strict=True)
    assert sqnr(converted(x).detach(), program(x)) > 40
    floats = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert len(program.buffer) < len(floats.buffer) - 128 * 24 * 3  # bytes: 4 a weight become less than one


def test_groups_keep_what_one_scale_a_channel_loses():
    layer, x = uneven(), torch.randn(16, 128) / torch.logspace(-1.5, 0, 4).repeat_interleave(32)
    grouped, channels = (sqnr(layer(x).detach(), convert(layer, x, s)(x).detach()) for s in (DYNAMIC_W4, PER_CHANNEL))
    assert grouped > channels + 6


def test_recovery_knows_the_groups():
    model, x = nn.Sequential(uneven(), nn.ReLU(), nn.Linear(24, 32), nn.Linear(32, 5)), torch.randn(64, 128)
    graph = qf.export(model.eval(), (x[:2],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(DYNAMIC_W4)), [x], progress=False)
    with torch.no_grad():
        ((simulated,),) = outputs(prepared, [(x,)], integers=True)
        torch.testing.assert_close(simulated, qf.convert(prepared)(x), rtol=1e-4, atol=1e-5)
        reference = model(x)
        recovered = qf.convert(qf.recover(prepared, [x], progress=False).graph)
        assert sqnr(reference, recovered(x)) >= sqnr(reference, simulated)
        corrected = qf.convert(correct_bias(prepared, [x + 1], progress=False))
        reference = model(x + 1)
        before, after = ((g(x + 1) - reference).mean(0).abs().max() for g in (qf.convert(prepared), corrected))
    assert after < 0.2 * before


@pytest.mark.parametrize(
    "weight",
    [
        TensorScheme(bits=8, symmetric=True, group=32),
        TensorScheme(bits=4, symmetric=True, group=16),
    ],
    ids=["8 bits", "groups of 16"],
)
def test_what_xnnpack_lacks_is_refused(weight):
    with pytest.raises(qf.QuantflowError, match="multiples of 32"):
        XNNPACKQuantizer(Scheme(activation=TensorScheme(dynamic=True), weight=weight))


def test_static_activations_are_refused():
    with pytest.raises(qf.QuantflowError, match="dynamic affine activations"):
        XNNPACKQuantizer(Scheme(weight=DYNAMIC_W4.weight))


@pytest.mark.parametrize("given", [{"group": -32, "symmetric": True}, {"group": 32}])
def test_a_scheme_that_makes_no_sense_is_refused(given):
    with pytest.raises(qf.QuantflowError, match="groups of"):
        TensorScheme(bits=4, **given)


def test_training_is_refused_by_name():
    graph = qf.export(uneven(), (torch.randn(2, 128),)).module()
    with pytest.raises(qf.QuantflowError, match="groups can't be trained"):
        qf.prepare(graph, XNNPACKQuantizer(DYNAMIC_W4), qat=True)


def test_the_scheme_survives_json():
    assert Scheme.from_json(DYNAMIC_W4.to_json()) == DYNAMIC_W4
    assert str(DYNAMIC_W4) == "dynamic w4a8 in groups of 32"


def test_state_of_the_observer_survives_a_checkpoint():
    observer, weight = PerGroupMinMaxObserver(32, quant_min=-7, quant_max=7), torch.randn(4, 64)
    observer(weight)
    with_float_weights = PerGroupMinMaxObserver(32, quant_min=-7, quant_max=7)
    with_float_weights.load_state_dict(observer.state_dict())
    assert all(map(torch.equal, with_float_weights.calculate_qparams(), observer.calculate_qparams()))
