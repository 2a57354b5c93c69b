"""The accuracy budget: the layer that breaks it is the one that goes back to float, as measured on the runtime."""

import warnings

import pytest
import torch
from networks import ConvNet, randomize_statistics, sqnr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchvision import models

import quantflow as qf
from quantflow.analysis.accuracy_control import _fewest, keep_within
from quantflow.analysis.evaluator import Evaluator
from quantflow.analysis.layers import layers_of, observers_in, still_quantized
from quantflow.simulation.network import outputs
from quantflow.simulation.partial import PartialNetwork
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.planted = nn.Linear(24, 24)
        self.third = nn.Linear(24, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.planted(x))
        return self.head(torch.relu(self.third(x)))


@pytest.fixture(scope="module")
def planted():
    """A network one of whose layers has in each row a weight that takes the levels of all others, and that nothing reads."""
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        model.first.weight[0] = 0
        model.first.bias[0] = -1  # an input of the planted layer that is always zero
        model.planted.weight[:, 0] = 300
    x = torch.randn(200, 16)
    return model, x, model(x).argmax(1)


def test_the_planted_layer_is_the_one_reverted(planted):
    model, x, labels = planted
    data = list(zip(x.split(50), labels.split(50), strict=True))
    result = qf.quantize(model, (x[:7],), data, recover=False, max_drop=0.02, progress=False)
    budget = result.report.accuracy_control
    assert [layer.layer for layer in budget.reverted] == ["planted"]
    assert budget.labelled
    assert budget.holds
    assert "planted" in str(result.report)
    assert budget.tried[0][0] == 0
    assert budget.tried[0][1] > 0.02
    with torch.no_grad():
        classes = torch.cat([result.program(part).argmax(1) for part in x[:196].split(7)])
    assert (classes != labels[:196]).float().mean() <= 0.03


def test_nothing_is_reverted_where_the_budget_holds_already(planted):
    _, x, _ = planted
    result = qf.quantize(Classifier().eval(), (x[:50],), x.split(50), recover=False, max_drop=0.1, progress=False)
    assert result.report.accuracy_control.reverted == ()
    assert not result.report.accuracy_control.labelled
    assert len(result.report.accuracy_control.tried) == 1


def test_a_budget_out_of_reach_gives_the_best_found_and_says_so(planted):
    _, x, _ = planted
    model = Classifier().eval()
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    costs = qf.sensitivity(prepared, [x], progress=False)
    program = qf.export(model, (x[:50],)).to_core_aten().to_edge().to_executorch()
    built = type("Built", (), {"program": program})
    evaluator = Evaluator(graph, [(x, torch.randint(6, (200,)))])
    with pytest.warns(qf.QuantflowWarning, match="were allowed"):
        kept = keep_within(-1.0, evaluator, built, lambda names: built, prepared, lambda: costs)
    assert not kept.accuracy_control.holds
    assert kept.accuracy_control.reverted == ()  # no more in float than brings something
    assert max(count for count, _ in kept.accuracy_control.tried) == len(costs.layers) - 1


def test_the_fewest_that_hold():
    order = list("abcdefgh")
    for needed in ({"a"}, {"c"}, {"b", "f"}, {"a", "d", "g"}):
        assert set(_fewest(order, lambda names, needed=needed: needed <= set(names))) == needed


def test_the_drop_is_the_same_in_any_order_of_the_data(planted):
    model, x, labels = planted
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    program = qf.export(model, (x[:16],)).to_core_aten().to_edge().to_executorch()

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(len(x))
            return iter(list(zip(x[order].split(33), (labels[order] + (order % 5 == 0)).split(33), strict=True)))

    evaluator = Evaluator(graph, Shuffled())
    assert evaluator.drop_on_runtime(program) == 0
    assert evaluator.drop_of(lambda flat: [-graph(flat[0])]) > 0.5


def test_still_quantized_is_what_a_quantizer_with_overrides_quantizes():
    model, x = randomize_statistics(ConvNet()).eval(), torch.randn(4, 3, 16, 16)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    for floating in (["stem"], ["head"], ["stem", "depthwise"], ["add"], ["depthwise", "add"]):
        where = {name: (lambda node, name=name: node.name == name) if name == "add" else name for name in floating}
        skipped = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(skip=list(where.values()))), [x], progress=False)
        with torch.no_grad():
            ours = PartialNetwork(prepared, [x], still_quantized(prepared, floating)).returned
            (theirs,) = outputs(skipped, [(x,)], integers=True)
        names = [
            {str(n.args[0]) for n in calls} for calls in (still_quantized(prepared, floating), observers_in(skipped))
        ]
        assert names[0] == names[1]
        assert sqnr(theirs[0], ours[0]) > 40  # a rounding may fall the other way


def test_partial_networks_are_float_and_integers_at_the_ends():
    model, x = randomize_statistics(ConvNet()).eval(), torch.randn(4, 3, 16, 16)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    every = frozenset(observers_in(prepared))
    none, whole = PartialNetwork(prepared, [x], ()), PartialNetwork(prepared, [x], every)
    with torch.no_grad():
        torch.testing.assert_close(none.returned[0], model(x), rtol=1e-4, atol=1e-5)
        assert sqnr(qf.convert(prepared)(x), whole.returned[0]) > 50  # biases are whole numbers there
    for layer in layers_of(prepared):
        for network, active in ((none, layer.observers), (whole, every - layer.observers)):
            again = PartialNetwork(prepared, [x], active).returned
            assert torch.equal(network.outputs(active)[0], again[0])


def test_sensitivity_names_the_planted_layer_both_ways(planted):
    model, x, _ = planted
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    found = qf.sensitivity(prepared, [x], progress=False)
    assert found.layers[0].layer == "planted"
    assert max(found.layers, key=lambda cost: cost.to_float).layer == "planted"
    assert found.layers[0].to_integers < 20 < found.layers[0].to_float
    assert all(cost.to_integers > 30 for cost in found.layers[1:])
    assert "planted" in str(found).splitlines()[1]
    assert '"planted"' in found.to_json()
    with pytest.raises(qf.QuantflowError, match="not prepared"):
        qf.sensitivity(graph, [x])
    with pytest.raises(qf.QuantflowError, match="not calibrated"):
        qf.sensitivity(qf.prepare(graph, XNNPACKQuantizer()), [x])


def test_a_budget_that_nothing_meets_leaves_what_can_be_quantized():
    """The last layer left may be one that only follows the integers of others."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)).eval()
    data = [torch.randn(20, 3, 8, 8) for _ in range(2)]
    wrong = [
        (x, (model(x).argmax(1) + 1) % 5) for x in data
    ]  # float is right nowhere; no drop at all, whatever is done
    assert qf.quantize(
        model, (data[0][:1],), data, max_drop=0, validation=wrong, progress=False
    ).report.accuracy_control.holds
    close = [(x, model(x).argmax(1)) for x in (torch.randn(2000, 3, 8, 8),)]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        budget = qf.quantize(
            model, (data[0][:1],), data, max_drop=0, validation=close, recover=False, progress=False
        ).report.accuracy_control
    assert budget.drop >= 0
    assert budget.tried[0][0] == 0


@pytest.fixture(scope="module")
def mobilenet():
    """MobileNetV3-Small after 24 steps on digits, its last layer solved for, with one layer that integers break."""
    digits = load_digits()
    pixels = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 8 - 1, size=32, mode="bilinear")
    images, labels = pixels.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target)
    model = models.mobilenet_v3_small(num_classes=10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=24)
    for index in torch.randint(1397, (24, 64)):
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the mean over what follows
            norm.reset_running_stats()
        for part in images[:512].split(256):
            model(part)
        # A layer with a weight in each row that takes the levels of all others, and that nothing reads.
        norm, planted, head = model.eval().features[12][1], model.classifier[0], model.classifier[3]
        norm.weight[0], norm.bias[0] = 0, -4
        read = model.classifier[:3](model.avgpool(model.features(images[:1397])).flatten(1)).double()
        read = torch.cat([read, torch.ones(len(read), 1)], 1)
        gram = read.T @ read + len(read) * 1e-3 * torch.eye(read.shape[1])
        solved = torch.linalg.solve(gram, read.T @ F.one_hot(labels[:1397], 10).double()).float()
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
        planted.weight[:, 0] = 20
    return model, images, labels


def test_mobilenet_v3_meets_its_budget_with_few_layers_in_float(mobilenet):
    model, images, labels = mobilenet
    held_out = list(zip(images[1397:1597].split(50), labels[1397:1597].split(50), strict=True))
    with torch.no_grad():
        assert sum(int((model(x).argmax(1) == y).sum()) for x, y in held_out) > 0.7 * 200
    data = [images[:16]]
    result = qf.quantize(model, (images[:1],), data, recover=False, max_drop=0.005, validation=held_out, progress=False)
    budget = result.report.accuracy_control
    assert budget.holds
    assert budget.drop <= 0.005
    assert budget.tried[0][1] > 0.1
    assert "classifier.0" in [layer.layer for layer in budget.reverted]
    assert len(budget.reverted) <= 3


def test_bad_input_is_named(planted):
    model, x, labels = planted
    quantize = {"recover": False, "max_drop": 0.01, "progress": False}
    with pytest.raises(qf.QuantflowError, match="once only"):
        qf.quantize(model, (x[:5],), iter([x]), **quantize)
    with pytest.raises(qf.QuantflowError, match="no share"):
        qf.quantize(model, (x[:5],), [x], **quantize | {"max_drop": 5})
    with pytest.raises(qf.QuantflowError, match="no classes"):
        qf.quantize(model, (x[:5],), [(x, labels.float())], **quantize)
    with pytest.raises(qf.QuantflowError, match="scores"):
        qf.quantize(nn.Sequential(model, nn.Unflatten(1, (2, 3))), (x[:5],), [x], **quantize)


def test_a_dynamic_input_is_charged_to_the_layer_that_reads_it():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    prepared = qf.prepare(qf.export(model, (torch.randn(3, 8),)).module(), XNNPACKQuantizer(DYNAMIC_INT8))
    found = {layer.name: len(layer.observers) for layer in layers_of(prepared)}
    assert found == {"0": 2, "2": 2}
