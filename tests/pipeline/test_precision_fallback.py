"""A quantized model whose outputs have too little signal falls back, and says so."""

import json

import pytest
import torch
from networks import sqnr
from torch import nn

import quantflow as qf
from quantflow import ptq
from quantizers import INT8, XNNPACKQuantizer


class Outliers(nn.Module):
    """Blocks as in a transformer, with a few features of the norms' outputs that are far larger than the others."""

    def __init__(self, blocks=3, factor=100.0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(blocks))
        self.ups, self.downs = (nn.ModuleList(nn.Linear(32, 32) for _ in range(blocks)) for _ in range(2))
        with torch.no_grad():
            for norm, up in zip(self.norms, self.ups, strict=True):
                norm.weight[:2] *= factor
                up.weight[:, :2] /= factor

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            hidden = up(norm(x))
            x = x + down(hidden * hidden.sigmoid())
        return x


def _quantized(model, **how):
    torch.manual_seed(1)
    data = [torch.randn(16, 32) for _ in range(8)]
    x = torch.randn(4, 32)
    result = qf.quantize(model.eval(), (x,), data, progress=False, **how)
    return result, sqnr(model(x).detach(), result.program(x))


def test_what_holds_is_measured_and_left_as_it_is():
    torch.manual_seed(0)
    result, found = _quantized(Outliers(factor=1.0))
    control = result.report.sqnr_control
    assert control.holds
    assert control.kept == "as planned"
    assert len(control.tried) == 1
    assert abs(control.sqnr - found) < 6
    assert json.loads(result.report.to_json())["sqnr-control"]["kept"] == "as planned"


def test_outliers_behind_norms_are_smoothed():
    torch.manual_seed(0)
    before, raw = _quantized(Outliers(), min_sqnr=None, recover=False)
    assert before.report.sqnr_control is None
    result, found = _quantized(Outliers(), min_sqnr=raw + 6, recover=False)
    assert result.report.sqnr_control.kept == "smoothed behind norms"
    assert found > raw + 3


class Scales(nn.Module):
    """A linear layer over rows of very different size, whose outputs a norm makes alike."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(32, 32, bias=False), nn.LayerNorm(32, eps=1e-12), nn.Linear(32, 8)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_linear_layers_to_blame_become_dynamic():
    torch.manual_seed(0)
    model = Scales().eval()

    def rows(count):
        return torch.randn(count, 32) * 10 ** -(torch.rand(count, 1) * 4)

    data, x = [rows(16) for _ in range(8)], rows(8)
    raw = qf.quantize(model, (x,), data, min_sqnr=None, progress=False)
    result = qf.quantize(model, (x,), data, progress=False)
    control = result.report.sqnr_control
    assert control.holds
    assert control.dynamic == ("first",)
    assert sqnr(model(x).detach(), result.program(x)) > max(20, sqnr(model(x).detach(), raw.program(x)) + 6)
    assert result.program.delegation.calls == 1
    assert "with dynamic activations: first" in str(result.report)


class Residual(nn.Module):
    """Linear layers between sums that a large feature leaves without resolution, as the stream of a transformer has them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.last = nn.Linear(32, 8)

    def forward(self, x):
        large = torch.ones(32)
        large[0] = 3000.0
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x)) * large
        return self.last(x / large)


def test_linear_layers_are_dynamic_with_float_between_them():
    torch.manual_seed(0)
    model, data, x = Residual().eval(), [torch.randn(16, 32) for _ in range(8)], torch.randn(4, 32)
    result = qf.quantize(model, (x,), data, recover=False, progress=False)
    control = result.report.sqnr_control
    assert control.tried[0][1] < 20
    assert control.holds
    assert control.kept == "dynamic activations, and float between linear layers"
    assert set(control.dynamic) <= {"layers.0", "layers.1", "layers.2", "last"}
    assert result.program.delegation.calls == 1
    assert sqnr(model(x).detach(), result.program(x)) > 20


def test_recovery_is_for_what_may_hold_and_what_is_kept(monkeypatch):
    torch.manual_seed(0)
    recovered, recover = [], ptq.recover

    def counted(graph, *given, **how):
        recovered.append(recover(graph, *given, **how))
        return recovered[-1]

    monkeypatch.setattr(ptq, "recover", counted)
    data, x = [torch.randn(16, 32) for _ in range(8)], torch.randn(4, 32)
    result = qf.quantize(Residual().eval(), (x,), data, progress=False)
    control = result.report.sqnr_control
    assert len(control.tried) > 1
    assert control.tried[0][1] < 10
    assert len(recovered) == 1
    assert recovered[0].sqnr == control.sqnr


class Sharp(nn.Module):
    """A convolution whose outputs differ by a factor of thousands, beside one that does not mind."""

    def __init__(self):
        super().__init__()
        self.first, self.sharp, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.sharp.weight[0] *= 3e4
            self.last.weight[:, 0] /= 3e4

    def forward(self, x):
        return self.last(self.sharp(self.first(x)).sin())


def test_single_layers_are_left_in_float():
    torch.manual_seed(0)
    model, data, x = Sharp().eval(), [torch.randn(4, 3, 8, 8) for _ in range(8)], torch.randn(2, 3, 8, 8)
    raw = qf.quantize(model, (x,), data, recover=False, min_sqnr=None, progress=False)
    assert sqnr(model(x).detach(), raw.program(x)) < 20
    result = qf.quantize(model, (x,), data, recover=False, progress=False)
    control = result.report.sqnr_control
    assert control.holds
    assert "sharp" in control.floating
    assert len(control.floating) < 3
    assert "in float: sharp" in str(result.report)
    assert sqnr(model(x).detach(), result.program(x)) > 18


def test_where_nothing_holds_the_best_comes_with_a_warning():
    torch.manual_seed(0)
    with pytest.warns(qf.QuantflowWarning, match="200 were asked for") as caught:
        result, _ = _quantized(Outliers(blocks=1), min_sqnr=200.0, recover=False)
    control = result.report.sqnr_control
    assert not control.holds
    assert control.sqnr == max(found for _, found in control.tried)
    assert control.blamed
    assert control.blamed[0] in str(caught[0].message)


def test_few_bits_are_the_choice_of_who_asks_for_them():
    torch.manual_seed(0)
    result, _ = _quantized(Outliers(), quantizer=XNNPACKQuantizer("w4a8"), recover=False)
    assert result.report.sqnr_control is None


def test_data_that_can_be_gone_through_once_are_not_gone_through_again():
    torch.manual_seed(0)
    model, x = Outliers(blocks=1).eval(), torch.randn(4, 32)
    with pytest.warns(qf.QuantflowWarning, match="200 were asked for"):
        result = qf.quantize(model, (x,), (torch.randn(8, 32) for _ in range(4)), min_sqnr=200.0, progress=False)
    assert len(result.report.sqnr_control.tried) == 1


@pytest.mark.parametrize("given", ["high", float("nan")])
def test_what_is_no_signal_to_noise_is_refused(given):
    with pytest.raises(qf.QuantflowError, match="no signal to noise") as raised:
        qf.quantize(nn.Linear(4, 4), (torch.randn(1, 4),), [torch.randn(2, 4)], min_sqnr=given, progress=False)
    assert raised.value.node == "min_sqnr"


def test_layers_that_an_override_gives_are_not_changed():
    torch.manual_seed(0)
    model, data, x = Sharp().eval(), [torch.randn(4, 3, 8, 8) for _ in range(8)], torch.randn(2, 3, 8, 8)
    quantizer = XNNPACKQuantizer(overrides={"sharp": INT8})
    with pytest.warns(qf.QuantflowWarning, match="asked for"):
        result = qf.quantize(model, (x,), data, quantizer=quantizer, recover=False, progress=False)
    assert "sharp" not in result.report.sqnr_control.floating
