"""A plan tells the truth: what it says before calibration is what the partitioned program then shows."""

import re

import pytest
import torch
from networks import ConvNet, randomize_statistics
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import quantflow as qf
from quantflow.graph.aten import argument
from quantizers import DYNAMIC_INT8, INT8, RuleQuantizer, XNNPACKQuantizer
from quantizers.xnnpack import XNNPACK_RULES

pytestmark = pytest.mark.slow

# The names that lowering gives to what core ATen calls otherwise.
RENAMED = {
    "_clone_dim_order": "clone",
    "lift_fresh_copy": "clone",
    "batch_norm": "convolution",  # one that stands alone is a convolution of single pixels
}
CLAMPS = {"relu", "hardtanh"}


def names(counted):
    found = {re.sub(r"^.*::|\..*$", "", name) for name in counted if "quantize" not in name}
    return {RENAMED.get(name, name).removesuffix("_copy") for name in found}


def hold_together(model, x, quantizer, *, qat=False):
    graph = qf.export(randomize_statistics(model).eval(), (x,)).module()
    plan = quantizer.plan(graph, qat=qat)
    converted = qf.convert(qf.calibrate(qf.prepare(graph, quantizer, qat=qat), [x], progress=False))
    delegation = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").delegation()
    assert plan.calls == delegation.calls, f"{plan}\n{delegation}"
    # A clamp before integers whose grid ends there as well is left out, which only the ranges tell.
    # The softmax of an image's rows is taken over a view of them, which only the order of memory in the delegate asks for.
    viewed = {"view"} if "_softmax" in names(delegation.floating) else set()
    left_out = CLAMPS | (viewed - names(plan.forecast.floating))
    assert names(plan.forecast.floating) - CLAMPS == names(delegation.floating) - left_out, str(plan)
    assert names(plan.forecast.portable) == names(delegation.portable), str(plan)
    integers = {name for name, tensor in converted.named_buffers() if tensor.dtype == torch.int8}
    for decision in plan.decisions:
        if decision.rule is not None and decision.rule.weight is not None:
            weight = argument(decision.node, decision.rule.weight).target
            assert any(name.startswith(f"{weight}_quantized") for name in integers) == (decision.scheme is not None)
    return plan


class Around(nn.Module):
    """Two convolutions and a function between them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Branches(nn.Module):
    """One branch waits for what leaves the delegate, the other need not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(y) * 2 + torch.fmod(y, 1.0) + torch.fmod(torch.exp(torch.fmod(y, 1.0)), 1.0)


IMAGE = torch.randn(2, 3, 12, 12)
SMALL = {
    "float inside the delegate": (Around(torch.sin), 1, 1),
    "a table without a rule": (Around(torch.exp), 1, 1),
    "a copy": (Around(lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), 1, 0),
    "nothing is left out": (Around(lambda y: y[:, 0:8]), 1, 0),
    "portable": (Around(lambda y: torch.fmod(y, 1.0)), 2, 1),
    "softmax over the last": (Around(lambda y: torch.softmax(y, -1)), 1, 1),
    "softmax over channels": (Around(lambda y: torch.softmax(y, 1)), 1, 1),
    "layer norm": (Around(lambda y: F.layer_norm(y, (12,))), 1, 1),
    "group norm": (Around(lambda y: F.group_norm(y, 2)), 1, 1),
    "average pool with a ceiling": (Around(lambda y: F.avg_pool2d(y, 5, 3, ceil_mode=True)), 1, 0),
    "padded average pool": (Around(lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)), 1, 0),
    "bilinear": (Around(lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")), 1, 1),
    "nearest": (Around(lambda y: F.interpolate(y, scale_factor=2)), 1, 0),
    "mish": (Around(F.mish), 2, 1),
    "power": (Around(lambda y: y**2), 1, 1),
    "third power": (Around(lambda y: y**3), 2, 1),
    "matmul": (Around(lambda y: y @ y.transpose(2, 3)), 1, 0),
    "global pool of channels that lie last": (
        Around(lambda y: F.adaptive_avg_pool2d(F.layer_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), 1)),
        1,
        1,
    ),
    "branches": (Branches(), 3, 1),
}


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name):
    model, calls, float_islands = SMALL[name]
    plan = hold_together(model, IMAGE, XNNPACKQuantizer())
    assert plan.calls == calls
    assert bool(plan.float_islands) == bool(float_islands)
    assert any(map(plan.outside, plan.decisions)) == (calls > 1)


TRANSFORMERS = {
    "ConvNeXt": lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]),
    "ViT": lambda: VisionTransformer(64, 16, 1, 2, 16, 32),
    "Swin": lambda: SwinTransformer([4, 4], 16, [2], [2], [4, 4]),
    "MaxViT": lambda: MaxVit((64, 64), 16, 4, [16], [1], 8, 0.1),
}


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    torch.manual_seed(0)
    assert hold_together(TRANSFORMERS[name](), torch.randn(1, 3, 64, 64), XNNPACKQuantizer()).calls == 1


CONVOLUTIONAL = {
    "MobileNetV2": lambda: models.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 1]]),
    "ResNet18": lambda: models.ResNet(models.resnet.BasicBlock, [1, 2, 1, 1]),
    "SqueezeNet": lambda: models.squeezenet1_1(weights=None),
    "ShuffleNetV2": lambda: models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 64]),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks_are_one_call(name):
    assert hold_together(CONVOLUTIONAL[name](), torch.randn(1, 3, 64, 64), XNNPACKQuantizer()).calls == 1


@pytest.mark.parametrize(
    "quantizer",
    [XNNPACKQuantizer(skip=["depthwise", "head"]), XNNPACKQuantizer(None, overrides={"head": DYNAMIC_INT8})],
)
def test_layers_left_in_float(quantizer):
    plan = hold_together(ConvNet(), torch.randn(2, 3, 16, 16), quantizer)
    assert plan.calls == 1
    assert names(plan.forecast.floating) >= {"convolution"}


def test_training_plans_the_same_calls():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert hold_together(model, IMAGE, XNNPACKQuantizer(), qat=True).calls == 1


def test_a_plan_shows_calls_and_what_leaves_the_delegate():
    graph = qf.export(SMALL["portable"][0], (IMAGE,)).module()
    plan = XNNPACKQuantizer().plan(graph)
    assert "float, portable" in str(plan)
    assert str(plan).endswith(
        "2 of 3 operators become integers, 1 stay in float between them; the delegate is called 2 times"
    )


def test_a_table_of_rules_alone_tells_no_calls():
    graph = qf.export(SMALL["portable"][0], (IMAGE,)).module()
    plan = RuleQuantizer(rules=XNNPACK_RULES).plan(graph)
    assert plan.calls is None
    assert "called" not in str(plan)


class Computed(nn.Module):
    """A convolution with a weight that follows from the input, which no backend has in integers, beside one that is."""

    def __init__(self):
        super().__init__()
        self.plain, self.scaled = nn.Conv2d(3, 4, 1), Scaled(4, 4, 1)

    def forward(self, x):
        return self.scaled(self.plain(x))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias)


def test_a_layer_asked_for_in_vain_is_named():
    graph = qf.export(Computed(), (IMAGE,)).module()
    for where in ("scaled", Scaled, "*"):
        with pytest.warns(qf.QuantflowWarning, match=r"scaled \(conv2d_1\).*its weight is computed"):
            qf.prepare(graph, XNNPACKQuantizer(overrides={where: INT8}))
        with pytest.raises(qf.QuantflowError, match="scaled") as caught:
            qf.prepare(graph, XNNPACKQuantizer(overrides={where: INT8}, strict=True))
        assert caught.value.stage == "plan"


def test_what_was_not_asked_for_is_no_complaint():
    graph = qf.export(Computed(), (IMAGE,)).module()
    for overrides in ({}, {"plain": INT8}, {"scaled": None}, [("scaled", INT8), ("scaled", None)]):
        qf.prepare(graph, XNNPACKQuantizer(overrides=overrides, strict=True))


def test_islands_that_leave_the_delegate_are_one_warning():
    model = nn.Sequential(*(Around(lambda y: torch.fmod(y, 1.0)) if i else nn.Conv2d(4, 3, 1) for i in (1, 0) * 4))
    graph = qf.export(model, (IMAGE,)).module()
    with pytest.warns(qf.QuantflowWarning) as caught:
        qf.prepare(graph, XNNPACKQuantizer())
    assert len(caught) == 1
    assert "fmod" in caught[0].message.node
    assert "calls it 5 times" in caught[0].message.reason
    with pytest.raises(qf.QuantflowError, match="fmod"):
        qf.prepare(graph, XNNPACKQuantizer(strict=True))
    qf.prepare(graph, XNNPACKQuantizer(skip=[lambda node: "fmod" in node.name], strict=True))


def test_islands_within_the_delegate_are_no_complaint():
    graph = qf.export(SMALL["softmax over the last"][0], (IMAGE,)).module()
    qf.prepare(graph, XNNPACKQuantizer(strict=True))


STATISTICS = {
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "instance norm without weights": nn.InstanceNorm2d(8),
    "batch norm": nn.BatchNorm2d(8, track_running_stats=False),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.filterwarnings("ignore:.edge.*left to portable kernels", "ignore:.plan.*which no delegate runs")
def test_norms_over_their_own_statistics_are_forecast_as_they_are_lowered(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), STATISTICS[name], nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    plan = XNNPACKQuantizer().plan(qf.export(model, (x,)).module())
    result = qf.quantize(model, (x,), [x], recover=False, progress=False)
    found = result.program.delegation
    assert (plan.calls, plan.forecast.portable.total()) == (found.calls, found.portable.total())


@pytest.mark.parametrize("change", [lambda n: n.clamp_(min=1e-6), lambda n: n.add_(1e-6)])
def test_a_norm_that_is_written_in_place_is_planned(change):
    model = Around(lambda y: y / change(torch.linalg.vector_norm(y, dim=1, keepdim=True)))
    plan = XNNPACKQuantizer().plan(qf.export(model, (IMAGE,)).module())
    assert plan.calls == 1
