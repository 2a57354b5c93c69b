"""The accuracy budget: the layer that breaks it is the one that goes back to float, as measured on the runtime."""

import warnings

import pytest
import torch
from networks import Classifier
from torch import nn

import quantflow as qf
from quantflow.analysis.accuracy_control import fewest, keep_within
from quantflow.analysis.evaluator import Evaluator
from quantizers import XNNPACKQuantizer

pytestmark = pytest.mark.slow


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
        assert set(fewest(order, lambda names, needed=needed: needed <= set(names))) == needed


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
