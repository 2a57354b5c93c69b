"""The forms of a prepared graph: what trains is what PTQ found, to the bit."""

import copy

import pytest
import torch
from networks import norm_networks, randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.observers import FixedQParamsObserver, MinMaxObserver
from quantflow.observers.observation import is_fake_quantizer, observer_of, observers_of
from quantflow.preparation.forms import make_trainable, ptq_form
from quantflow.simulation.float_network import float_network
from quantizers import DYNAMIC_INT8, DYNAMIC_W4, W4A8, Scheme, TensorScheme, XNNPACKQuantizer

PER_TENSOR = Scheme(weight=TensorScheme(symmetric=True))
SCHEMES = {"int8": Scheme(), "w4a8": W4A8, "per tensor": PER_TENSOR, "dynamic": DYNAMIC_INT8}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.second = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, eps=1e-3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return self.head(nn.functional.relu6(self.second(self.depthwise(y))).mean((2, 3)))


def data(count=4):
    torch.manual_seed(1)
    return [torch.randn(8, 3, 12, 12) for _ in range(count)]


def prepared(scheme, *, model=None, **options):
    torch.manual_seed(0)
    model = model or Small()
    randomize_statistics(model)
    graph = qf.export(model.eval(), (data()[0],), dynamic_batch=True).module()
    return qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(scheme), **options), data(), progress=False)


def integers(graph):
    """What conversion writes, by name."""
    return dict(qf.convert(graph).state_dict())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("kind", [qf.FakeQuantize, qf.LearnedStepSize])
def test_training_starts_from_recovered_ptq(scheme, kind):
    graph = prepared(scheme, qat=True, fake_quantize=kind)
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    trainable = qf.recover(graph, data(), progress=False).graph
    recovered = qf.recover(ptq_form(graph), data(), progress=False).graph
    assert all(is_fake_quantizer(module) for module in observers_of(trainable).values())
    assert not any(is_fake_quantizer(module) for module in observers_of(recovered).values())
    ours, theirs = integers(trainable), integers(recovered)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = data()[0]
    assert torch.equal(qf.convert(trainable)(x), qf.convert(recovered)(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_ptq_form_is_what_prepare_makes_for_ptq(scheme):
    x = data()[0]
    ours, theirs = qf.convert(ptq_form(prepared(scheme, qat=True))), qf.convert(prepared(scheme))
    assert ours(x).sub(theirs(x)).norm() < 0.01 * theirs(x).norm()  # batch norm folded before or after calibration


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_graph_prepared_for_ptq_trains_from_its_integers(scheme):
    graph = qf.recover(prepared(scheme), data(), progress=False).graph
    found = integers(graph)
    started = copy.deepcopy(graph)
    make_trainable(started)
    assert all(torch.equal(found[name], tensor) for name, tensor in integers(started).items())
    qf.train(graph, [(x, torch.arange(8) % 5) for x in data()], lr=1e-3, distill=None, progress=False)
    after = integers(graph)
    assert found.keys() == after.keys()
    assert any(not torch.equal(found[name], after[name]) for name in found)
    fixed = {name: m.scale for name, m in graph.named_modules() if isinstance(m, FixedQParamsObserver)}
    assert all(torch.equal(scale, started.get_submodule(name).scale) for name, scale in fixed.items())


def test_a_graph_of_stock_torchao_trains_from_its_integers():
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    graph = prepare_pt2e(torch.export.export(Small().eval(), (data()[0],)).module(), stock())
    qf.calibrate(graph, data(), progress=False)
    recovered = qf.recover(graph, data(), progress=False).graph
    found = integers(recovered)
    make_trainable(recovered)
    assert all(torch.equal(found[name], tensor) for name, tensor in integers(recovered).items())


@pytest.mark.parametrize("name", norm_networks())
def test_every_norm_folds_into_the_network_in_inference(name):
    model, x = norm_networks()[name]
    torch.manual_seed(0)
    randomize_statistics(model)
    try:
        graph = qf.prepare(qf.export(model.eval(), (x,)).module(), XNNPACKQuantizer(), qat=True)
    except qf.QuantflowError:
        pytest.skip("refused in prepare")
    expected = model(x)
    assert (ptq_form(qf.calibrate(graph, [(x,)], progress=False))(x) - expected).norm() < 1e-4 * expected.norm()


class SharedInPart(nn.Module):
    """A convolution called twice, once before a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(torch.relu(x))


def with_a_wide_norm(model):
    """``model`` with a batch norm that widens the range of the weight before it."""
    torch.manual_seed(0)
    randomize_statistics(model)
    with torch.no_grad():
        model.norm.weight.mul_(20)
    return model.eval()


def test_a_weight_shared_with_a_layer_without_norm_keeps_its_observer():
    model, x = with_a_wide_norm(SharedInPart()), data()[0]
    graph = qf.prepare(qf.export(model, (x,), dynamic_batch=True).module(), XNNPACKQuantizer(), qat=True)
    expected = model(x)
    found = qf.convert(ptq_form(qf.calibrate(graph, data(), progress=False)))(x)
    assert (found - expected).norm() < 0.05 * expected.norm()


class Joined(nn.Module):
    """Two branches that share one range with what joins and pools them."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(nn.functional.max_pool2d(torch.cat([self.left(x), self.right(x)], 1), 2))


def stock(*, qat=False):
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

    return Stock().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=qat))


def test_observers_that_torchao_shares_under_several_names_are_all_replaced():
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    graph = prepare_pt2e(torch.export.export(Joined().eval(), (data()[0],)).module(), stock())
    graph = qf.recover(qf.calibrate(graph, data(), progress=False), data(), progress=False).graph
    called = {str(node.target) for node in graph.graph.nodes if observer_of(node, graph) is not None}
    before = [len({id(graph.get_submodule(name)) for name in called}), integers(graph)]
    assert len(called) > before[0]
    qf.train(graph, [(x, torch.zeros(8, 4, 5, 5)) for x in data()], loss=nn.functional.mse_loss, lr=0.0, progress=False)
    assert all(is_fake_quantizer(graph.get_submodule(name)) for name in called)
    assert len({id(graph.get_submodule(name)) for name in called}) == before[0]
    assert all(torch.equal(before[1][name], tensor) for name, tensor in integers(graph).items())


def test_the_ptq_form_of_torchaos_fake_quantizers():
    model, x = with_a_wide_norm(Small()), data()[0]
    captured = qf.export(model, (x,), dynamic_batch=True).module()
    graph = qf.prepare(captured, stock(qat=True), qat=True)
    qf.calibrate(graph, data(), progress=False)
    expected = model(x)
    assert (qf.convert(ptq_form(graph))(x) - expected).norm() < 0.1 * expected.norm()


def test_a_dynamic_range_stays_that_of_each_input():
    graph = qf.export(nn.Conv1d(4, 4, 1).eval(), (torch.randn(2, 4, 4),)).module()
    observer = MinMaxObserver(qscheme=torch.per_tensor_symmetric, quant_min=-127, is_dynamic=True)
    graph.add_submodule("quantization.x", observer)
    (x,) = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(x):
        call = graph.graph.call_module("quantization.x", (x,))
    x.replace_all_uses_with(call)
    call.args = (x,)
    graph.recompile()
    make_trainable(graph)
    fake_quantize = graph.get_submodule("quantization.x")
    for size in (1.0, 100.0, 1.0):
        fake_quantize(given := size * torch.randn(100))
    assert (fake_quantize(given) - given).abs().max() < 0.05


def test_learned_scales_count_features_and_fixed_ones_stay():
    graph = qf.recover(prepared(Scheme(), qat=True, fake_quantize=qf.LearnedStepSize), data(), progress=False).graph
    gradients = []
    for x in (data()[0][:1], data()[0][:1].repeat(8, 1, 1, 1)):
        graph.zero_grad()
        graph(x).square().mean(0).sum().backward()
        gradients.append(graph.quantization.x.scale.grad.item())
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)


class Subclassed(qf.FakeQuantize):
    """One of a person's own."""


def test_a_class_of_ones_own_is_kept():
    graph = qf.recover(prepared(Scheme(), qat=True, fake_quantize=Subclassed), data(), progress=False).graph
    assert all(type(module) is Subclassed for module in observers_of(graph).values())


def test_recovery_after_training_measures_against_what_was_trained():
    graph = qf.recover(prepared(W4A8), data(), progress=False).graph
    qf.train(graph, [(x, torch.arange(8) % 5) for x in data()], epochs=5, lr=0.05, progress=False)
    trained, x = float_network(graph)(data()[0]), data()[0]
    assert torch.equal(trained, float_network(qf.recover(graph, data(), progress=False).graph)(x))
    assert (qf.convert(graph)(x) - trained).norm() < (trained - Small()(x)).norm()


@pytest.mark.parametrize("scheme", [Scheme(), PER_TENSOR], ids=["per channel", "per tensor"])
def test_averages_and_resumes(scheme, tmp_path):
    labelled = [(x, torch.arange(8) % 5) for x in data()]
    ends = []
    for epochs in (1, 2, 2):
        graph = qf.recover(prepared(scheme), data(), progress=False).graph
        folder = tmp_path / ("resumed" if len(ends) < 2 else "whole")
        checkpoints = qf.Checkpoints(folder)
        qf.train(graph, labelled, epochs=2, lr=1e-3, ema=0.5, checkpoints=checkpoints, progress=False)
        if epochs == 1:  # as if the second epoch had been cut short
            checkpoints.paths()[-1].unlink()
        ends.append(integers(graph))
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[2].items())


def test_a_frozen_layer_stays_frozen():
    model = Small()
    for parameter in (*model.conv.parameters(), *model.norm.parameters()):
        parameter.requires_grad_(False)
    graph = qf.recover(prepared(W4A8, model=model, qat=True), data(), progress=False).graph
    learns = {name: parameter.requires_grad for name, parameter in graph.named_parameters()}
    assert not learns["conv.weight"]
    assert not learns["conv.bias"]
    assert learns["depthwise.weight"]
    assert learns["head.bias"]


def test_weights_in_groups_are_refused():
    graph = qf.export(nn.Linear(64, 8).eval(), (torch.randn(2, 64),)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(DYNAMIC_W4)), [torch.randn(2, 64)], progress=False)
    with pytest.raises(qf.QuantflowError, match="groups"):
        make_trainable(prepared)


def test_a_graph_without_ranges_is_refused():
    graph = qf.prepare(qf.export(Small().eval(), (data()[0],)).module(), XNNPACKQuantizer())
    with pytest.raises(qf.QuantflowError, match="not calibrated"):
        make_trainable(graph)
    assert not any(isinstance(module, FixedQParamsObserver) for module in graph.modules())
