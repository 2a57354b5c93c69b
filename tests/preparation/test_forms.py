"""The forms of a prepared graph: what trains is what PTQ found, to the bit."""

import copy

import pytest
import torch
from networks import norm_networks, randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.observers import FixedQParamsObserver
from quantflow.observers.observation import is_fake_quantizer, observers_of
from quantflow.preparation.forms import make_trainable, ptq_form
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
    qf.train(graph, [(x, torch.arange(8) % 5) for x in data()], lr=1e-3, progress=False)
    after = integers(graph)
    assert found.keys() == after.keys()
    assert any(not torch.equal(found[name], after[name]) for name in found)
    fixed = {name: m.scale for name, m in graph.named_modules() if isinstance(m, FixedQParamsObserver)}
    assert all(torch.equal(scale, started.get_submodule(name).scale) for name, scale in fixed.items())


def test_a_graph_of_stock_torchao_trains_from_its_integers():
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    program = torch.export.export(Small().eval(), (data()[0],))
    graph = prepare_pt2e(program.module(), Stock().set_global(get_symmetric_quantization_config(is_per_channel=True)))
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
