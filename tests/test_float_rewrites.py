"""The float path: what executorch lacks or computes wrongly is written as what it has, with the same outputs on the runtime."""

import copy

import pytest
import torch
from networks import norm_networks, randomize_statistics, sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.lifted import rewritten
from quantizers import XNNPACKQuantizer

VOLUME = torch.randn(2, 4, 5, 6, 7)
IMAGE = torch.randn(2, 4, 7, 9)


def lowered(model, *x, delegate="xnnpack", dynamic_batch=False):
    core = qf.export(model.eval(), x, dynamic_batch=dynamic_batch).to_core_aten()
    return core.to_edge(delegate).to_executorch()


def same(model, *x, delegate="xnnpack"):
    """Whether the program on the runtime says what the model says, within float rounding."""
    with torch.no_grad():
        expected, found = model.eval()(*x), lowered(model, *x, delegate=delegate)(*x)
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == theirs.dtype
        if theirs.is_floating_point():
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(ours, theirs)
    return True


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


class TwoNorms(nn.Module):
    """One convolution called twice, before norms of its own each."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.first(self.conv(x)) + self.second(self.conv(x * 0.5))


class OneConvolutionBetween(nn.Module):
    """A convolution before a norm, and the same weights without one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) - self.conv(x)


NORMS = {
    "one convolution, two norms": (TwoNorms, IMAGE),
    "one convolution with and without": (OneConvolutionBetween, IMAGE),
    "linear over rank 3": (lambda: nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(7)), IMAGE[0]),
    "norm behind norm": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "rows": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(7, affine=False)), IMAGE[0, 0].T),
    "volumes": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(4)), VOLUME),
    "statistics of the batch": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_are_folded_right(name):
    build, x = NORMS[name]
    assert same(randomize_statistics(build()), x)


@pytest.mark.parametrize(
    "name", ["conv_bn", "shared_conv", "transposed_groups_bn", "conv_two_users", "convnet", "linear_bn"]
)
def test_norms_run_within_the_delegate(name):
    model, x = norm_networks()[name]
    model = randomize_statistics(copy.deepcopy(model))
    program = lowered(model, x)
    assert not any("batch_norm" in op for op in (program.delegation.delegated | program.delegation.portable))
    assert sqnr(model.eval()(x), program(x)) > 60


def test_norms_of_a_program_that_comes_in_decomposed():
    model = randomize_statistics(TwoNorms()).eval()
    core = torch.export.export(model, (IMAGE,)).run_decompositions()
    program = qf.export(core).to_core_aten().to_edge("xnnpack").to_executorch()
    assert program.delegation.fraction == 1.0
    assert sqnr(model(IMAGE), program(IMAGE)) > 60


class OwnStatistics(nn.Module):
    """A norm by a mean that the program itself keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3)), alpha=0.5)
        return F.batch_norm(x, self.mean, self.var)


def test_a_norm_by_statistics_that_change_is_not_frozen():
    model = OwnStatistics().eval()
    program = lowered(copy.deepcopy(model), IMAGE + 1)
    for x in (IMAGE + 1, IMAGE - 3):
        assert torch.allclose(program(x), model(x), atol=1e-4)


ROWS = {
    "plain": lambda: nn.Conv1d(6, 6, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose1d(6, 6, 3, stride=2, padding=1, groups=2),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_float_convolution_over_rows_between_integers(name):
    model, x = nn.Sequential(nn.Conv1d(4, 6, 3), ROWS[name](), nn.Conv1d(6, 4, 1)).eval(), torch.randn(2, 4, 12)
    graph = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(skip=["1"]))
    converted = qf.convert(qf.calibrate(graph, [x], progress=False))
    program = lowered(converted, x)
    assert program.delegation.fraction == 1.0
    assert sqnr(converted(x), program(x)) > 35


def test_a_float_convolution_over_rows_before_integers():
    model, x = nn.Sequential(nn.Conv1d(5, 5, 1, groups=5), nn.SiLU(), nn.Conv1d(5, 8, 3)).eval(), torch.randn(2, 5, 6)
    quantizer = XNNPACKQuantizer(skip=["0"])
    prepared = qf.prepare(qf.export(model, (x,)).module(), quantizer)
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    program = lowered(converted, x)
    assert sqnr(converted(x), program(x)) > 35


class Recurrent(nn.Module):
    """One convolution over rows, called twice."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(torch.erf(self.convolution(x)) + x)


@pytest.mark.parametrize("convolution", [nn.Conv1d(8, 8, 3, padding="same"), nn.ConvTranspose1d(8, 8, 3, padding=1)])
def test_a_convolution_over_rows_that_is_called_twice(convolution):
    same(Recurrent(convolution).eval(), torch.randn(2, 8, 5))


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_a_convolution_over_rows_that_is_called_twice_in_integers(qat):
    model, x = nn.Sequential(*[nn.Conv1d(8, 8, 3, padding=1)] * 2).eval(), torch.randn(2, 8, 5)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(), qat=qat).eval()
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    program = lowered(converted, x)
    assert program.delegation.fraction == 1.0
    assert sqnr(converted(x), program(x)) > 35


PADS = {
    "cut on all sides": (-1, -1, -1, -1),
    "cut and padded": (-2, 1, 3, -1),
    "cut at one end": (0, -2),
    "of the batch": (0, 0, 0, 0, -1, 1, 0, 1),
}


@pytest.mark.parametrize("delegate", ["xnnpack", None])
@pytest.mark.parametrize("name", PADS)
def test_pads_that_cut_off(name, delegate):
    assert same(Function(lambda x: F.pad(x, PADS[name], value=0.5) * 2), IMAGE, delegate=delegate)


def test_pads_that_cut_off_in_integers():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ZeroPad2d((-1, -1, 2, -1)), nn.Conv2d(4, 4, 1)).eval()
    result = qf.quantize(model, (IMAGE,), [IMAGE], progress=False)
    assert result.program.delegation.calls == 1
    assert sqnr(model(IMAGE), result.program(IMAGE)) > 25


FOLDS = {
    "overlapping": ({"kernel_size": 3, "padding": 1}, IMAGE),
    "strided with a rest": ({"kernel_size": (2, 3), "stride": 2}, IMAGE),
    "dilated": ({"kernel_size": 2, "dilation": 2, "padding": (1, 2), "stride": 3}, IMAGE),
    "without a batch": ({"kernel_size": 2}, IMAGE[0]),
}


@pytest.mark.parametrize("delegate", ["xnnpack", None])
@pytest.mark.parametrize("name", FOLDS)
def test_fold(name, delegate):
    sides, x = FOLDS[name]
    model = Function(lambda x: F.fold(F.unfold(x, **sides) * 2, x.shape[-2:], **sides))
    assert same(model, x, delegate=delegate)


class OutlookAttention(nn.Module):
    """As in VOLO: each place weighs the patch around it, and overlapping patches add up."""

    def __init__(self, channels=8, heads=2):
        super().__init__()
        self.heads, self.value, self.weights = heads, nn.Linear(channels, channels), nn.Linear(channels, heads * 81)
        self.pool, self.out = nn.AvgPool2d(2, 2, ceil_mode=True), nn.Linear(channels, channels)

    def forward(self, x):
        n, h, w, c = x.shape
        rows, columns = (h + 1) // 2, (w + 1) // 2
        value = F.unfold(self.value(x).permute(0, 3, 1, 2), 3, padding=1, stride=2)
        value = value.reshape(n, self.heads, c // self.heads, 9, rows * columns).permute(0, 1, 4, 3, 2)
        pooled = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        weights = self.weights(pooled).reshape(n, rows * columns, self.heads, 9, 9).permute(0, 2, 1, 3, 4)
        mixed = (torch.softmax(weights, -1) @ value).permute(0, 1, 4, 3, 2).reshape(n, c * 9, rows * columns)
        return self.out(F.fold(mixed, (h, w), 3, padding=1, stride=2).permute(0, 2, 3, 1))


def test_outlook_attention():
    model, x = OutlookAttention().eval(), torch.randn(1, 6, 6, 8)
    assert same(model, x)
    result = qf.quantize(model, (x,), [x], progress=False, recover=False)
    assert sqnr(model(x), result.program(x)) > 20


class SharedVolumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


class ComputedWeight(nn.Module):
    """A standardised weight, as networks without norms have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 2, 3, 3))

    def forward(self, x, scale):
        return F.conv3d(x, self.weight * scale)


VOLUMES = {
    "shared weight": (SharedVolumes(), VOLUME),
    "computed weight": (ComputedWeight(), VOLUME, torch.rand(6, 1, 1, 1, 1)),
    "without a batch": (nn.Conv3d(4, 6, (2, 3, 3), padding="same"), VOLUME[0]),
    "norm and clamp": (nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU()), VOLUME),
    "transposed": (nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1), VOLUME),
    "transposed in groups": (
        nn.ConvTranspose3d(4, 6, (3, 2, 3), stride=(3, 1, 2), groups=2, dilation=(2, 1, 1)),
        VOLUME,
    ),
    "transposed, cut": (nn.ConvTranspose3d(4, 3, (2, 3, 1), padding=(2, 1, 0)), VOLUME),
    "transposed without a batch": (nn.ConvTranspose3d(4, 6, 2, bias=False), VOLUME[0]),
    "average": (nn.AvgPool3d(2, ceil_mode=True), VOLUME),
    "average of what is there": (nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False), VOLUME),
    "average, divided otherwise": (nn.AvgPool3d((3, 2, 1), divisor_override=5), VOLUME),
    "adaptive average": (nn.AdaptiveAvgPool3d((3, None, 4)), VOLUME),
    "global average": (nn.AdaptiveAvgPool3d(1), VOLUME),
    "maximum": (nn.MaxPool3d(3, 2, 1, ceil_mode=True), VOLUME),
    "maximum and its place": (nn.MaxPool3d(2, 2, 1, dilation=2, return_indices=True), VOLUME),
    "adaptive maximum": (nn.AdaptiveMaxPool3d((2, 3, 7)), VOLUME),
    "adaptive maximum and its place": (nn.AdaptiveMaxPool3d((2, 3, 4), return_indices=True), VOLUME),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes(name):
    model, *x = VOLUMES[name]
    assert same(copy.deepcopy(randomize_statistics(model)), *x)


@pytest.mark.parametrize("name", ["transposed", "average of what is there", "adaptive maximum"])
def test_volumes_without_a_delegate_and_of_any_batch(name):
    model, x = VOLUMES[name]
    program = lowered(model, x, delegate=None, dynamic_batch=6)
    for batch in (x, torch.randn(5, *x.shape[1:])):
        assert torch.allclose(program(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_core_aten_has_a_form_of_what_torch_does_not_decompose():
    core = qf.export(nn.AdaptiveMaxPool2d((3, 4)), (IMAGE,)).to_core_aten()
    assert torch.equal(core.module()(IMAGE), F.adaptive_max_pool2d(IMAGE, (3, 4)))
    assert "adaptive_max_pool2d" in str(core.source.graph)


ORDERS = {
    "adaptive maximum": (nn.AdaptiveMaxPool2d((3, 4)), IMAGE),
    "adaptive maximum that divides": (nn.AdaptiveMaxPool2d((7, 3), return_indices=True), IMAGE),
    "adaptive maximum and its place": (nn.AdaptiveMaxPool2d((4, None), return_indices=True), IMAGE),
    "adaptive maximum of rows": (nn.AdaptiveMaxPool1d(4), IMAGE[0]),
    "median": (Function(torch.median), IMAGE[0, 0]),
    "median of rows": (Function(lambda x: x.median(1)), IMAGE),
    "median with NaN": (
        Function(lambda x: x.median(0).values),
        torch.tensor([[1.0, float("nan")], [2.0, 3.0], [0.0, 1.0]]),
    ),
    "median of integers": (Function(lambda x: x.median(-1).values), torch.randint(0, 50, (4, 6))),
    "sorted truths and places": (Function(lambda x: (torch.sort(x > 0)[0], torch.argsort(x))), IMAGE),
    "sorted": (Function(lambda x: tuple(x.sort(1, descending=True))), IMAGE),
    "two decimals": (Function(lambda x: x.round(decimals=2)), IMAGE),
    "tens": (Function(lambda x: (x * 100).round(decimals=-1)), IMAGE),
}


@pytest.mark.parametrize("name", ORDERS)
def test_maxima_medians_and_decimals(name):
    model, x = ORDERS[name]
    assert same(model, x)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 2}, {"include_last_offset": True}], ids=str)
def test_bags_of_embeddings(mode, settings):
    offsets = torch.tensor([0, 3, 3, 5])  # the second bag is empty
    assert same(nn.EmbeddingBag(10, 5, mode=mode, **settings), torch.tensor([1, 2, 4, 5, 2, 3, 9]), offsets)


def test_an_elu_whose_alpha_is_left_out():
    assert same(Function(lambda x: F.elu_(x * 2) * 3), IMAGE)


def test_a_program_that_needs_no_rewrite_is_left_alone():
    program = qf.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), (IMAGE,)).program
    assert rewritten(program, lambda graph: None) is program


class Counter(nn.Module):
    """State that the program writes to, an input that is a number, and a norm to fold."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, input, scale: float):
        self.calls.add_(1)
        return self.norm(self.conv(input)) * scale + self.calls


def test_state_and_inputs_stay_and_the_stages_before_are_unchanged():
    model = randomize_statistics(Counter()).eval()
    exported = qf.export(copy.deepcopy(model), (IMAGE, 2.0))
    core = exported.to_core_aten()
    code, names = str(core.program.graph), set(exported.program.state_dict)
    program = core.to_edge("xnnpack").to_executorch()
    for _ in range(2):
        assert torch.allclose(program(IMAGE, 2.0), model(IMAGE, 2.0), atol=1e-4)
    assert str(core.program.graph) == code
    assert "batch_norm" in code
    assert set(exported.program.state_dict) == names
