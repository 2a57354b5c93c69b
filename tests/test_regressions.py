"""Bugs that were, each with the smallest network that showed it."""

import copy
import pickle

import pytest
import torch
from networks import ConvNet, NoGradInside, randomize_statistics, sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantizers import DYNAMIC_INT8, INT8, Scheme, TensorScheme, XNNPACKQuantizer

IMAGE = torch.randn(2, 3, 8, 8)


def quantize(model, *x, qat=False):
    graph = qf.export(model.eval(), x).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
    for batch in [x]:
        qf.calibrate(prepared, [batch], progress=False)
    return qf.convert(prepared)


def lower(converted, *x):
    return qf.export(converted, x).to_core_aten().to_edge("xnnpack").to_executorch()


@pytest.mark.parametrize("gamma", [0.0, 1e-9])
@pytest.mark.parametrize("qat", [False, True])
def test_dead_channels_keep_their_bias_on_the_device(gamma, qat):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = gamma, 2.0
    converted = quantize(model, IMAGE, qat=qat)
    expected = converted(IMAGE)
    assert torch.allclose(expected[:, 1], torch.tensor(2.0), atol=0.05)
    assert sqnr(expected, lower(converted, IMAGE)(IMAGE)) > 35


class Computed(nn.Module):
    """Batch norm and bias that are computed, not stored."""

    def __init__(self):
        super().__init__()
        self.conv, self.g = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x):
        y = F.batch_norm(self.conv(x), self.mean, self.var, 1 + self.g, self.g * 0.5)
        return F.conv2d(y, torch.ones(2, 4, 1, 1), self.g[:2] * 2)


def test_computed_scale_and_bias_are_left_alone():
    model = Computed().eval()
    graph = qf.export(model, (IMAGE,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    assert torch.allclose(prepared(IMAGE), model(IMAGE), atol=1e-5)
    assert any(
        "bias is computed" in d.reason or "weight is computed" in d.reason
        for d in XNNPACKQuantizer().plan(graph).floating
    )


class Tied(nn.Module):
    """Two convolutions with the same parameters, called before different norms; and one weight with two biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.n1, self.n2, self.n3 = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other = nn.Parameter(torch.randn(3))

    def forward(self, x):
        x = self.n2(self.b(self.n1(self.a(x))))
        x = self.n1(self.b(self.n3(self.a(x))))
        return self.n3(F.conv2d(x, self.a.weight, self.a.bias)) + self.n3(F.conv2d(x, self.a.weight, self.other))


@pytest.mark.parametrize("qat", [False, True])
def test_tied_parameters_fold_each_with_its_own_norm(qat):
    model = randomize_statistics(Tied()).eval()
    graph = qf.export(model, (IMAGE,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
    if not qat:
        assert torch.allclose(prepared(IMAGE), model(IMAGE), atol=1e-4)
    converted = qf.convert(qf.calibrate(prepared, [IMAGE], progress=False))
    assert sqnr(model(IMAGE), converted(IMAGE)) > 20


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(weight=TensorScheme(per_channel=True)), "symmetric"),
        (Scheme(activation=TensorScheme(dynamic=True), weight=TensorScheme(symmetric=True)), "per-channel weights"),
        (Scheme(activation=TensorScheme(symmetric=True, dynamic=True)), "affine"),
        (Scheme(activation=TensorScheme(per_channel=True)), "one scale"),
        (Scheme(activation=TensorScheme(bits=4)), "8 bits"),
    ],
)
def test_schemes_that_xnnpack_computes_wrongly_are_refused(scheme, words):
    with pytest.raises(qf.QuantflowError, match=words):
        XNNPACKQuantizer(scheme)
    with pytest.raises(qf.QuantflowError, match=words):
        XNNPACKQuantizer(overrides={"layer": scheme})


def test_an_unbatched_convolution_stays_float():
    plan = XNNPACKQuantizer().plan(qf.export(nn.Conv2d(3, 4, 1), (IMAGE[0],)).module())
    assert "no batch dimension" in plan.floating[0].reason


class WritesAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x)
        y[:, 0] = 0
        return self.b(y)


def test_a_tensor_that_is_written_in_part_stays_float():
    model = WritesAPart().eval()
    graph = qf.export(model, (IMAGE,)).module()
    quantizer = XNNPACKQuantizer()
    assert [(d.node.name, d.reason) for d in quantizer.plan(graph).floating if d.rule is not None] == [
        ("conv2d", "it is written in place, or writes, where others see it")
    ]
    prepared = qf.calibrate(qf.prepare(graph, quantizer), [IMAGE], progress=False)
    assert sqnr(model(IMAGE).detach(), qf.convert(prepared)(IMAGE).detach()) > 30


class Difference(nn.Module):
    def forward(self, a, b):
        return 2 * a - b


def test_one_tensor_given_for_two_inputs_stays_two_inputs():
    graph = qf.export(Difference(), (IMAGE, IMAGE)).module()
    assert torch.equal(graph(IMAGE, IMAGE + 1), 2 * IMAGE - (IMAGE + 1))


class Keywords(nn.Module):
    def forward(self, x, *, a, b):
        return x + 2 * a - b


@pytest.mark.parametrize("dynamic_batch", [False, 8])
def test_keyword_inputs_in_another_order(dynamic_batch):
    x, a, b = torch.randn(3, 2, 4)
    graph = qf.export(Keywords(), (x,), {"a": a, "b": b}).module()
    again = qf.export(graph, (x,), {"b": b, "a": a}, dynamic_batch=dynamic_batch)
    assert torch.equal(again.module()(x, a=a, b=b), Keywords()(x, a=a, b=b))
    program = again.to_core_aten().to_edge().to_executorch()
    assert torch.allclose(program(x, b=b, a=a), Keywords()(x, a=a, b=b))


def test_grad_mode_does_not_leak_out_of_a_graph():
    graph = qf.export(NoGradInside(), (torch.randn(3, 6),)).module()
    for twin in (graph, copy.deepcopy(graph)):
        with torch.no_grad():
            assert not twin(torch.randn(3, 6)).requires_grad
            assert not torch.is_grad_enabled()
        assert twin(torch.randn(3, 6)).requires_grad
        with pytest.raises(RuntimeError):
            twin(torch.randn(3, 5))
        assert torch.is_grad_enabled()


def test_a_stock_graph_captured_in_training_mode_converts_to_inference():
    model = randomize_statistics(ConvNet())
    stock = torch.export.export(model.train(), (torch.randn(4, 3, 16, 16),)).module()
    x = torch.randn(4, 3, 16, 16)
    converted = qf.convert(qf.calibrate(qf.prepare(stock, XNNPACKQuantizer()), [x], progress=False))
    assert torch.equal(converted(x), converted(x))
    assert sqnr(model.eval()(x), converted(x)) > 20


def test_stock_modules_enter_export():
    x = torch.randn(4, 3, 16, 16)
    model = randomize_statistics(ConvNet()).eval()
    stock = torch.export.export(model, (x,)).module()
    assert torch.allclose(qf.export(stock, (x,)).module()(x), model(x), atol=1e-6)


def test_batch_norm_frozen_by_the_user_stays_frozen_in_training():
    x = torch.randn(4, 3, 16, 16)
    graph = qf.export(randomize_statistics(ConvNet()), (x,)).module().freeze_batch_norm()
    before = graph.stem_bn.running_mean.clone()
    qf.train(graph, [(x, torch.arange(4))] * 2, progress=False)
    assert torch.equal(graph.stem_bn.running_mean, before)
    assert graph.batch_norm_frozen


def test_a_calibrated_state_loads_with_its_ranges():
    x = torch.randn(4, 3, 16, 16)
    graph = qf.export(randomize_statistics(ConvNet()), (x,)).module().eval()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    loaded = qf.prepare(graph, XNNPACKQuantizer())
    loaded.load_state_dict(prepared.state_dict())
    assert torch.equal(qf.convert(loaded)(x), qf.convert(prepared)(x))


class CatAfterDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        z, d = self.b(x), F.dropout(self.a(x) * 3, 0.1, self.training)
        return torch.cat([z, d], 1), self.c(d)


def test_concatenation_behind_dropout_shares_one_grid_and_loads():
    converted = quantize(CatAfterDropout(), IMAGE)
    for ours, expected in zip(lower(converted, IMAGE)(IMAGE), converted(IMAGE), strict=True):
        assert sqnr(expected, ours) > 30


def test_bounds_survive_a_program_captured_in_training_mode():
    batch = torch.export.Dim("batch", min=1, max=8)
    x = torch.randn(4, 3, 16, 16)
    program = torch.export.export(ConvNet().train(), (x,), dynamic_shapes=({0: batch},))
    lowered = qf.export(program).to_core_aten().to_edge().to_executorch()
    assert lowered(x[:1]).shape == (1, 5)
    assert lowered(torch.cat([x, x])).shape == (8, 5)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_constants_of_the_trace_are_no_state():
    model = Constant()
    graph = qf.export(model, (torch.randn(2, 4),)).module()
    assert set(graph.state_dict()) == set(model.state_dict())
    graph.load_state_dict(model.state_dict())
    twin = copy.deepcopy(graph)
    assert torch.equal(twin(torch.ones(2, 4)), model(torch.ones(2, 4)))
    assert set(twin.state_dict()) == set(model.state_dict())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return torch.cond(x.sum() > 0, lambda y: y + torch.ones(4), lambda y: y - 1, (y,))


def test_constants_inside_branches_survive():
    x = torch.rand(2, 4)
    model = Branches().eval()
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    assert torch.allclose(prepared(x), model(x), atol=1e-6)


def test_two_inputs_and_a_target():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.linear(a + b)

    a = torch.randn(2, 4)
    graph = qf.prepare(qf.export(Two(), (a, a)).module(), XNNPACKQuantizer())
    for batch in (((a, a), torch.zeros(2)), (a, a), (a, a, torch.zeros(2))):
        qf.calibrate(graph, [batch], progress=False)


def test_quantize_warns_of_what_stays_outside():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(torch.cumsum(x, 1))

    with pytest.warns(qf.QuantflowWarning, match="cumsum"):
        qf.quantize(
            Running(), (torch.randn(1, 8),), [torch.randn(4, 8)], quantizer=XNNPACKQuantizer(INT8), progress=False
        )


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.conv(x) + self.seen.add_(1.0)


def test_proving_a_program_leaves_the_state_alone():
    model, x = Stateful().eval(), torch.randn(2, 4, 8, 8)
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert model.seen.item() == 0
    assert torch.allclose(program(x), model.conv(x) + 1, atol=1e-4)


def test_a_write_into_a_buffer_stays_one():
    model, x = Stateful().eval(), torch.randn(2, 4, 8, 8)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    assert torch.allclose(prepared(x) + 1, prepared(x), atol=1e-5)


STEEP = {
    "log of a sum": lambda y: torch.log(y.relu() + 1e-3),
    "log of a clamp": lambda y: torch.log(y.relu().clamp(min=1e-6)),
    "guarded quotient": lambda y: y.relu() / (y.relu() + 1e-3),
    "norm by hand": lambda y: (y - y.mean(1, True)) / torch.sqrt(y.var(1, keepdim=True) + 1e-5),
    "softplus by hand": lambda y: torch.log(1 + torch.exp(y)),
    "softmax by hand": lambda y: torch.exp(y) / torch.exp(y).sum(1, True),
}


class Behind(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.filterwarnings("ignore:.plan.:quantflow.QuantflowWarning")  # of float that leaves the delegate
@pytest.mark.parametrize("name", STEEP)
def test_small_constants_keep_guarding(name):
    torch.manual_seed(0)
    model, x = Behind(STEEP[name]).eval(), torch.randn(2, 4, 8, 8)
    graph = qf.export(model, (x,)).module()
    converted = qf.convert(qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False))
    assert torch.isfinite(converted(x)).all()


ODD = {
    "rsub with alpha": lambda y: torch.rsub(y, 1.0, alpha=2),
    "scalars": lambda y: y * (y.abs().mean() * 2.0),
    "mean of another dtype": lambda y: y.mean((2, 3), dtype=torch.float64),
    "integers clamped": lambda y: y * (y * 4).long().clamp(0.5, 3.5),
    "one tensor joined and written": lambda y: torch.cat([y]).add_(1) + y,
    "average over halves": lambda y: torch.nn.functional.avg_pool2d(y.half() * 0.5, 2).float(),
    "to": lambda y: Behind.forward(CONV, y.to(torch.float32)),
}
CONV = Behind(torch.relu)


@pytest.mark.filterwarnings("ignore:.plan.:quantflow.QuantflowWarning")  # of float that leaves the delegate
@pytest.mark.parametrize("name", ODD)
def test_preparing_keeps_odd_functions(name):
    model, x = Behind(ODD[name]).eval(), torch.randn(2, 4, 8, 8)
    model.aside, model.conv2 = nn.Parameter(torch.ones(1, dtype=torch.float64)), CONV
    expected = model(x)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())(x)
    assert prepared.dtype == expected.dtype
    assert prepared.shape == expected.shape
    assert torch.allclose(prepared, expected, atol=1e-4)


def test_a_pickled_graph_still_takes_any_batch():
    model, x = Behind(lambda y: y.mean((2, 3))).eval(), torch.randn(2, 4, 8, 8)
    graph = pickle.loads(pickle.dumps(qf.export(model, (x,), dynamic_batch=True).module()))
    assert qf.prepare(graph, XNNPACKQuantizer())(torch.randn(5, 4, 8, 8)).shape == (5, 4)


def test_learned_steps_train_what_is_written_in_place():
    model, x = (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten()),
        torch.randn(2, 4, 8, 8),
    )
    graph = qf.export(model, (x,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True, fake_quantize=qf.LearnedStepSize)
    history = qf.train(prepared, [(x, torch.tensor([0, 1]))], epochs=2, progress=False)
    assert len(history.loss) == 2


def test_a_parameter_called_p_is_no_probability():
    class Named(Behind):
        def __init__(self):
            super().__init__(torch.relu)
            self.p = nn.Parameter(torch.ones(4))

    assert qf.export(Named(), (torch.randn(2, 4, 8, 8),)).inference_only == ()


def test_a_network_that_cancels_to_nothing_agrees():
    model, x = Behind(lambda y: y - y.mean((2, 3), keepdim=True)), torch.zeros(1, 4, 8, 8)
    model.conv = nn.Conv2d(4, 4, 1)
    qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)


@pytest.mark.parametrize("foreign", [False, True])
def test_channels_last_models_and_examples_lower_right(foreign):
    model = ConvNet().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    layouts = [p.stride() for p in model.parameters()]
    exported = qf.export(torch.export.export(model, (x,)) if foreign else model, (x,))
    assert [p.stride() for p in model.parameters()] == layouts
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    for given in (x, x.contiguous()):
        torch.testing.assert_close(program(given), model(given).detach(), rtol=1e-4, atol=1e-5)


def test_a_layout_changed_within_a_model_lowers_right():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x.contiguous(memory_format=torch.channels_last)).contiguous().flatten(1)

    model, x = Changing().eval(), torch.randn(2, 3, 8, 8)
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_channel_alone_in_channels_last_is_read_as_it_lies():
    """With one channel both layouts are contiguous, and their strides differ."""
    x = torch.randn(2, 1, 5, 7).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Linear(7, 12), nn.ReflectionPad2d(1), nn.Conv2d(1, 4, 3)).eval()
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert sqnr(model(x), program(x)) > 60


def test_shared_weights_in_channels_last_stay_one():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    model[2].weight = model[0].weight
    model.to(memory_format=torch.channels_last)
    graph = qf.export(model, (torch.randn(2, 4, 8, 8),)).module().train()
    assert len(list(graph.parameters())) == len(list(model.parameters())) == 3
    optimizer = torch.optim.SGD(graph.parameters(), 0.1)
    graph(torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    named = dict(graph.named_parameters(remove_duplicate=False))
    assert torch.equal(named["0.weight"], named["2.weight"])


def test_a_view_that_channels_last_alone_allows():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            return self.linear(x.permute(0, 2, 3, 1).view(-1, 3))

    model, x = Pixels(), IMAGE.to(memory_format=torch.channels_last)
    graph = qf.export(model, (x,)).module()
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(graph(x.contiguous()), model(x))


def test_a_graph_of_stock_prepare_is_exported_after_convert():
    """Stock prepare registers the observer of a shared grid under two names."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.first(x).transpose(1, 2).transpose(1, 2))

    model, x = Turned().eval(), torch.randn(2, 4, 8)
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), XNNPACKQuantizer())
    prepared(x)
    converted = qf.convert(prepared)
    assert sqnr(converted(x), lower(converted, x)(x)) > 60


class Keys(nn.Module):
    """A layer that reads a tensor in integers whose range is chosen at run time, beside one that reads it otherwise."""

    def __init__(self, beside):
        super().__init__()
        self.keys, self.queries, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.beside = nn.Dropout(0.1), beside

    def forward(self, x):
        return self.beside(self, x, self.drop(self.keys(x)))


@pytest.mark.parametrize(
    "beside",
    [lambda m, x, k: (torch.bmm(m.queries(x), k.mT), m.out(k)), lambda m, x, k: (m.queries(k), m.out(k))],
    ids=["a centred grid", "a grid fixed ahead"],
)
def test_a_dynamic_layer_reads_what_others_read_on_grids_of_their_own(beside):
    model, x = Keys(beside).eval(), torch.randn(2, 4, 8)
    quantizer = XNNPACKQuantizer(overrides={"out": DYNAMIC_INT8})
    graph = qf.export(model, (x,)).module()
    converted = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), [x], progress=False))
    for found, expected in zip(lower(converted, x)(x), model(x), strict=True):
        assert sqnr(expected.detach(), found) > 30


@pytest.mark.parametrize("qat", [False, True])
def test_batch_norm_over_rows_of_three_dimensions_behind_integers(qat):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2))

    model, x = randomize_statistics(Turned()).eval(), torch.randn(3, 5, 8)
    converted = quantize(model, x, qat=qat)
    with torch.no_grad():
        assert sqnr(model(x), converted(x)) > 25
        assert sqnr(converted(x), lower(converted, x)(x)) > 60


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("length", [6, 8])
def test_batch_norm_behind_a_convolution_without_a_batch_norms_no_channels(length, qat):
    """[channels, length]: batch norm counts dimension 1, the length."""
    model = randomize_statistics(nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(length), nn.Linear(length, 4))).eval()
    x = torch.randn(3, length)
    with torch.no_grad():
        assert sqnr(model(x), quantize(model, x, qat=qat)(x)) > 20


def test_strides_of_channels_last_are_refused():
    class Strided(nn.Module):
        def forward(self, x):
            return torch.as_strided(x, (128, 3), (3, 1)) * 2

    with pytest.raises(qf.QuantflowError, match="by strides") as raised:
        qf.export(Strided(), (IMAGE.to(memory_format=torch.channels_last),))
    assert raised.value.stage == "export"
