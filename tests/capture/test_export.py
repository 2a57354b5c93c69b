"""Stage 1: capture, structure, gradients, and errors of export that are seen as such."""

import inspect

import pytest
import torch
from networks import ConvNet, NoGradInside, Structured, randomize_statistics
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer

X = torch.randn(4, 3, 16, 16)


def quantized(graph):
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    qf.calibrate(prepared, [X], progress=False)
    return qf.convert(prepared)


def test_without_quantization():
    model = ConvNet()
    core = qf.export(model, (X,)).to_core_aten()
    assert torch.allclose(core.module()(X), model.eval()(X), atol=1e-5)


def test_quantized_and_exported_again():
    model = randomize_statistics(ConvNet())
    exported = qf.export(model, (X,))
    again = qf.export(quantized(exported.module()), (X,))
    assert type(again) is type(exported)
    core = again.to_core_aten()
    assert any("quantized_decomposed" in str(n.target) for n in core.program.graph.nodes)


def test_gradients_equal_eager():
    model = randomize_statistics(ConvNet(p=0.5)).train()
    graph = qf.export(model, (X,)).module()
    assert graph.training
    target = torch.randint(0, 5, (4,))
    for module in (model, graph):
        torch.manual_seed(1)
        nn.functional.cross_entropy(module(X), target).backward()
    for (name, eager), (same, ours) in zip(model.named_parameters(), graph.named_parameters(), strict=True):
        assert name == same
        assert torch.allclose(eager.grad, ours.grad, atol=1e-5), name
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer.float(), graph.get_buffer(name).float(), atol=1e-5), name


class Merges(nn.Linear):
    """A low-rank layer as loralib's: ``train(False)`` adds its update to the weight, ``train(True)`` takes it out again."""

    def __init__(self):
        super().__init__(6, 6)
        self.update, self.merged = nn.Parameter(torch.randn(6, 6) * 1e3), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.update.data * (-1 if mode else 1)
            self.merged = not mode
        return self


@pytest.mark.parametrize("mode", [True, False])
def test_export_leaves_a_model_that_computes_in_its_switch_as_it_was(mode):
    model = nn.Sequential(Merges(), nn.Sequential(nn.Linear(6, 6), Merges())).train(not mode)
    model[1].train(mode)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [(m.training, getattr(m, "merged", None)) for m in model.modules()]
    exported = qf.export(model, (torch.randn(2, 6),))
    assert exported.inference_only == ("0 (Merges)", "1.1 (Merges)")  # what it trains, merged, is not what eager trains
    assert [(m.training, getattr(m, "merged", None)) for m in model.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_export_leaves_the_model_as_it_was():
    model = ConvNet().train()
    model.stem_bn.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = qf.export(model, (X,)).module()
    assert model.training
    assert not model.stem_bn.training
    assert model.dropout.training
    with torch.no_grad():
        next(graph.parameters()).zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("batch", [1, 4])
def test_dynamic_batch(batch):
    model = ConvNet().eval()
    graph = qf.export(model, (X[:batch],), dynamic_batch=True).module()
    for size in (1, 2, 7):
        x = torch.randn(size, 3, 16, 16)
        assert torch.allclose(graph(x), model(x), atol=1e-6)


def test_dynamic_batch_with_keyword_inputs():
    model = Structured().eval()
    graph = qf.export(model, (torch.randn(1, 8),), {"y": torch.randn(1, 4)}, dynamic_batch=True).module()
    x, y = torch.randn(5, 8), torch.randn(5, 4)
    ours, eager = graph(x, y=y), model(x, y=y)
    assert torch.equal(ours["sum"], eager["sum"])
    assert torch.equal(ours["parts"][0], eager["parts"][0])


def test_capture_under_no_grad_still_quantizes():
    with torch.no_grad():
        graph = qf.export(ConvNet(), (X,)).module()
    assert len(XNNPACKQuantizer().plan(graph).integer) >= 5


def test_regions_without_gradients_are_quantized_and_stay_without():
    model = NoGradInside()
    graph = qf.export(model, (torch.randn(3, 6),)).module()
    assert len(XNNPACKQuantizer().plan(graph).integer) == 2
    graph(torch.randn(3, 6)).sum().backward()
    assert graph.backbone.weight.grad is None
    assert graph.head.weight.grad is not None
    assert torch.is_grad_enabled()


def test_exported_program_from_elsewhere():
    model = randomize_statistics(ConvNet())
    for mode in (model.eval(), model.train()):
        program = torch.export.export(mode, (X,))
        graph = qf.export(program).module().eval()
        assert torch.allclose(graph(X), model.eval()(X), atol=1e-5)


class DataDependent(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("call", "node"),
    [
        (lambda: qf.export(DataDependent(), (X,)), None),
        (lambda: qf.export("model", (X,)), "model"),
        (lambda: qf.export(ConvNet(), X), "args"),
        (lambda: qf.export(ConvNet(), (X[:, :2],)), "args"),
        (lambda: qf.export(ConvNet(), (X, X), dynamic_batch=True), "args"),
        (lambda: qf.export(ConvNet(), (X,), XNNPACKQuantizer()), "kwargs"),
        (lambda: qf.export(ConvNet(), (X,), dynamic_shapes=("b",), dynamic_batch=True), "dynamic_shapes"),
        (lambda: qf.export(ConvNet(), (X,), dynamic_shapes=(None, None), dynamic_batch=True), "dynamic_shapes"),
        (lambda: qf.export(ConvNet(), (X,), dynamic_shapes={"picture": None}, dynamic_batch=True), "dynamic_shapes"),
    ],
)
def test_what_can_not_be_exported_is_an_error_of_export(call, node):
    with pytest.raises(qf.QuantflowError) as caught:
        call()
    assert caught.value.stage == "export"
    assert caught.value.remedy or caught.value.__cause__
    if node:
        assert caught.value.node == node


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_of_the_trace_names_the_line_of_the_model(strict):
    x = X.clone().requires_grad_() * 2  # no leaf: it can't be copied deeply
    line = inspect.getsourcelines(DataDependent.forward)[1] + 1
    with pytest.raises(qf.QuantflowError, match=r"could not trace DataDependent at .*test_export\.py") as caught:
        qf.export(DataDependent(), (x,), strict=strict)
    assert f"test_export.py:{line}:" in caught.value.reason
    assert "dropout_capture" not in caught.value.reason


def test_exporting_a_prepared_graph_names_convert():
    prepared = qf.prepare(qf.export(ConvNet(), (X,)).module(), XNNPACKQuantizer())
    with pytest.raises(qf.QuantflowError, match=r"qf\.convert"):
        qf.export(prepared, (X,))


class StateOfOne(torch.nn.Module):
    """A state for a batch of one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(1, 4))

    def forward(self, x):
        return torch.cat([x, self.state], 1)


def test_a_batch_that_is_fixed_by_a_state_is_told_apart_from_a_model_that_fails():
    with pytest.raises(qf.QuantflowError, match="not on a batch of two") as caught:
        qf.export(StateOfOne(), (torch.randn(1, 4),), dynamic_batch=True)
    assert caught.value.node == "dynamic_batch"
    assert "dynamic_batch=False" in caught.value.remedy
    with pytest.raises(qf.QuantflowError, match="itself does not run on the example inputs"):
        qf.export(StateOfOne(), (torch.randn(2, 4),), dynamic_batch=True)


def test_a_size_that_can_not_be_as_dynamic_as_declared_names_its_input():
    class Strided(torch.nn.Module):
        def forward(self, *, images):
            rows = images[::2]
            return rows - rows.mean(0) if rows.shape[0] != 1 else rows

    with pytest.raises(qf.QuantflowError, match="Constraints violated") as caught:
        qf.export(Strided(), (), {"images": torch.randn(3, 4)}, dynamic_batch=True)
    assert (caught.value.stage, caught.value.node) == ("export", "images")
    assert "dynamic_batch=False" in caught.value.remedy


IMAGE = torch.randn(2, 3, 8, 8)


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


def test_stock_modules_enter_export():
    x = torch.randn(4, 3, 16, 16)
    model = randomize_statistics(ConvNet()).eval()
    stock = torch.export.export(model, (x,)).module()
    assert torch.allclose(qf.export(stock, (x,)).module()(x), model(x), atol=1e-6)


def test_bounds_survive_a_program_captured_in_training_mode():
    batch = torch.export.Dim("batch", min=1, max=8)
    x = torch.randn(4, 3, 16, 16)
    program = torch.export.export(ConvNet().train(), (x,), dynamic_shapes=({0: batch},))
    lowered = qf.export(program).to_core_aten().to_edge().to_executorch()
    assert lowered(x[:1]).shape == (1, 5)
    assert lowered(torch.cat([x, x])).shape == (8, 5)


def test_a_dimension_that_varies_from_an_example_of_one():
    shapes = {"input": {0: torch.export.Dim("b", min=1, max=8)}}
    with pytest.raises(qf.QuantflowError) as raised:
        qf.export(nn.Sequential(nn.Linear(4, 4)), (torch.randn(1, 4),), dynamic_shapes=shapes)
    assert "two or more" in raised.value.remedy


class Squeezed(torch.nn.Module):
    def forward(self, x):
        return x.relu().squeeze()


def test_a_batch_of_one_that_has_other_dimensions_than_others_is_refused():
    with pytest.raises(qf.QuantflowError, match=r"output 0 has the shape \[4, 4\] for a batch of one") as caught:
        qf.export(Squeezed(), (torch.randn(1, 4, 4),), dynamic_batch=True)
    assert (caught.value.stage, caught.value.node) == ("export", "dynamic_batch")
    assert qf.export(Squeezed(), (torch.randn(2, 4, 4),), dynamic_batch=True).module()(torch.randn(3, 4, 4)).shape == (
        3,
        4,
        4,
    )
    assert qf.export(Squeezed(), (torch.randn(1, 4, 4),)).module()(torch.randn(1, 4, 4)).shape == (4, 4)


def test_the_check_of_a_batch_of_one_leaves_the_model_and_the_random_state_as_they_were():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.step = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            with torch.no_grad():
                self.step.mul_(2)
            return torch.nn.functional.dropout(x, 0.5, training=True) * self.step

    model, before = Counts().eval(), torch.get_rng_state()
    qf.export(model, (torch.randn(1, 8, generator=torch.Generator()),), dynamic_batch=True)
    assert model.step == 1
    assert torch.equal(torch.get_rng_state(), before)
