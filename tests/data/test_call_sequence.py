"""Sequences of calls: each begins in the first state, wherever data are taken."""

import copy
import math

import pytest
import torch
from streaming import NETWORKS
from torch import nn

import quantflow as qf
from quantflow.analysis.evaluator import Evaluator
from quantflow.data.batches import count_of
from quantflow.metrics import signal_to_noise as sqnr
from quantflow.simulation.output_gradients import output_gradients
from quantflow.simulation.stateful_calls import holds_state
from quantizers import XNNPACKQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:.*:quantflow.QuantflowWarning")


class Sums(nn.Module):
    """Adds up what it gets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.eye_(self.linear.weight), nn.init.zeros_(self.linear.bias)
        self.register_buffer("sum", torch.ones(1, 4))

    def forward(self, x):
        self.sum.add_(x)
        return self.linear(self.sum)


ONES = torch.ones(1, 4)


def prepared():
    return qf.prepare(qf.export(Sums().eval(), (ONES,)).module(), XNNPACKQuantizer())


def greatest(graph):
    observed = [m for m in graph.modules() if hasattr(m, "max_val") and m.max_val.numel() == 1]
    return max(float(m.max_val) for m in observed)


def test_calibration_begins_anew_with_each_sequence():
    graph = qf.calibrate(prepared(), [qf.CallSequence([ONES] * 3), qf.CallSequence(iter([ONES] * 4))], progress=False)
    assert greatest(graph) == 5
    assert greatest(qf.calibrate(prepared(), [ONES] * 7, progress=False)) == 8


def test_most_batches_and_their_number_count_calls():
    data = [qf.CallSequence([ONES] * 3), ONES]
    assert count_of(data, stage="calibrate") == 4
    assert greatest(qf.calibrate(prepared(), data, max_batches=2, progress=False)) == 3


def test_a_sample_holds_the_state_before_each_call():
    graph, sample = prepared(), qf.Sample()
    qf.calibrate(graph, [qf.CallSequence([ONES] * 3)] * 2, sample=sample, progress=False)
    assert sorted(float(state[0, 0]) for _, state in sample.batches()) == [1, 1, 2, 2, 3, 3]
    assert all(holds_state(graph, flat) for flat in sample.batches())
    assert torch.equal(graph.get_buffer("sum"), torch.ones(1, 4))


def test_verify_begins_anew_in_each_stage():
    model, data = Sums().eval(), [qf.CallSequence([ONES] * 3), qf.CallSequence([ONES] * 3)]
    graph = qf.calibrate(prepared(), data, progress=False)
    converted = qf.convert(graph)
    program = qf.export(copy.deepcopy(converted), (ONES,)).to_core_aten().to_edge("xnnpack").to_executorch()
    stages = {"float": model, "prepared": graph, "converted": converted, ".pte": program}
    seen = []
    found = qf.verify(
        stages, data, metric=lambda y, _: seen.append(y[:, 0].round().tolist()) or 0.0, latency_runs=0, progress=False
    )
    assert seen == [[2.0, 3.0, 4.0] * 2] * 4
    assert min(stage.output.sqnr_db for stage in found.stages[1:]) > 30


class Votes(nn.Module):
    """A classifier of what it has got so far."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("sum", torch.zeros(1, 4))

    def forward(self, x):
        self.sum.add_(x)
        return self.linear(self.sum)


def votes():
    torch.manual_seed(0)
    return Votes().eval(), [qf.CallSequence(list(torch.randn(5, 1, 4))) for _ in range(4)]


def test_accuracy_is_measured_from_the_first_state_of_each_sequence():
    model, data = votes()
    graph = qf.export(model, (ONES,)).module().eval()
    evaluator = Evaluator(graph, data)
    program = qf.export(copy.deepcopy(graph), (ONES,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert evaluator.examples == 20
    assert evaluator.drop_on_runtime(program) == 0
    assert torch.equal(graph.get_buffer("sum"), torch.zeros(1, 4))
    found = qf.quantize(model, (ONES,), data, max_drop=0.5, dynamic_batch=False, progress=False).program
    first = found(ONES).clone()
    found.reset()
    assert torch.equal(found(ONES), first)


def test_fidelity_of_equal_networks_is_infinite():
    model, data = votes()
    graphs = [qf.export(copy.deepcopy(model), (ONES,)).module().eval() for _ in range(2)]
    fidelity = qf.Fidelity(graphs[0], data)
    assert [fidelity(graphs[1]) for _ in range(2)] == [float("inf")] * 2
    assert all(torch.equal(graph.get_buffer("sum"), torch.zeros(1, 4)) for graph in graphs)


def test_training_takes_no_sequences():
    model, data = votes()
    graph = qf.prepare(qf.export(model, (ONES,)).module(), XNNPACKQuantizer(), qat=True)
    qf.calibrate(graph, data, progress=False)
    with pytest.raises(qf.QuantflowError, match="no sequences"):
        qf.train(graph, data, loss=lambda y, _: y.square().mean(), epochs=1, progress=False)


class Places(nn.Module):
    """A place that is read by a write and moves on, and a maximum that begins at minus infinity."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(8, 4))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.register_buffer("top", torch.full((1, 4), -torch.inf))

    def forward(self, x):
        y = self.linear(x)
        self.cache.index_copy_(0, self.place, y)
        self.place.add_(1)
        self.top.copy_(torch.maximum(self.top, y))
        return self.cache.sum(0, keepdim=True) + self.top


def test_gradients_reach_what_state_is_written_from():
    torch.manual_seed(0)
    data = [qf.CallSequence(list(torch.randn(6, 1, 4))) for _ in range(3)]
    graph, sample = qf.prepare(qf.export(Places().eval(), (ONES,)).module(), XNNPACKQuantizer()), qf.Sample()
    qf.calibrate(graph, data, sample=sample, progress=False)
    gradients = output_gradients(graph, sample.batches(), progress=False)
    assert gradients.rows
    assert all(rows.isfinite().all() for found in gradients.rows.values() for rows in found)
    recovered = qf.recover(graph, sample, progress=False)
    assert "range optimization" in {step.name for step in recovered.steps}
    assert all(math.isfinite(step.sqnr) for step in recovered.steps)


def test_a_network_in_half_precision_with_state_falls_back():
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
            self.register_buffer("sum", torch.zeros(1, 4))

        def forward(self, x):
            self.sum.add_(x)
            return self.linear(self.norm(self.sum))

    model = Normed().eval().half()
    data = [qf.CallSequence([x.half() for x in torch.randn(6, 1, 4)]) for _ in range(3)]
    how = {"dynamic_batch": False, "min_sqnr": 90.0, "recover": False, "progress": False}
    result = qf.quantize(copy.deepcopy(model), (ONES.half(),), data, **how)
    assert len(result.report.sqnr_control.tried) > 1
    graph = qf.export(model, (ONES.half(),)).module()
    assert qf.diagnose(graph, result.graph, data, progress=False).layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder by index_copy_", "LSTM detector"])
def test_recovery_of_a_network_with_state_is_measured_and_never_below(name):
    torch.manual_seed(0)
    make, calls = NETWORKS[name]
    model = make().eval()
    data, unseen = ([qf.CallSequence(calls(16, seed)) for seed in seeds] for seeds in (range(4), range(4, 8)))
    graph = qf.prepare(qf.export(copy.deepcopy(model), calls(1)[0]).module(), XNNPACKQuantizer())
    sample = qf.Sample()
    qf.calibrate(graph, data, sample=sample, progress=False)
    drawn, given = qf.recover(graph, sample, progress=False), qf.recover(graph, data, progress=False)
    assert {step.name for step in drawn.steps} >= {"range optimization", "weight reconstruction"}
    assert [step.sqnr for step in drawn.steps] == pytest.approx([step.sqnr for step in given.steps])
    assert drawn.sqnr >= drawn.steps[0].sqnr
    figures = qf.verify(
        {"float": model, "as calibrated": graph, "recovered": drawn.graph}, unseen, latency_runs=0, progress=False
    )
    before, after = (stage.output.sqnr_db for stage in figures.stages[1:])
    assert after > before - 1


@pytest.mark.slow
def test_quantize_holds_its_signal_to_noise_on_calls_of_a_network_with_state():
    torch.manual_seed(0)
    make, calls = NETWORKS["LSTM detector"]
    model, data = make().eval(), [qf.CallSequence(calls(16, seed)) for seed in range(4)]
    result = qf.quantize(copy.deepcopy(model), calls(1)[0], data, dynamic_batch=False, progress=False)
    assert result.report.sqnr_control.sqnr > 20
    with torch.no_grad():
        expected, found = (
            torch.stack([net(*call).clone() for call in calls(16, 9)]) for net in (model, result.program)
        )
    assert sqnr(expected, found) > 20
