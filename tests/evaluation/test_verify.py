"""Verification: a stage beside itself is equal, what is planted is found, and stages of any tool and form can enter."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from networks import ConvNet, Structured, randomize_statistics
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def road():
    """One model at every stage, and labelled data whose targets are the float model's own."""
    torch.manual_seed(0)
    model = randomize_statistics(ConvNet()).eval()
    with torch.no_grad():  # several classes, not one that the bias says
        model.head.weight.mul_(10)
        model.head.bias.zero_()
    batches = [3 * torch.randn(rows, 3, 1, 1) + torch.randn(rows, 3, 16, 16) for rows in (6, 5)]  # images that differ
    with torch.no_grad():
        data = [(x, model(x).argmax(1)) for x in batches]
    example = (batches[0][:1],)
    prepared = qf.prepare(qf.export(model, example, dynamic_batch=True).module(), XNNPACKQuantizer())
    qf.calibrate(prepared, batches, progress=False)
    converted = qf.convert(prepared)
    program = qf.export(converted, example).to_core_aten().to_edge("xnnpack").to_executorch()
    return model, prepared, converted, program, data


def verify(stages, data, **options):
    return qf.verify(stages, data, **{"progress": False, "latency_runs": 0, **options})


def test_every_stage_beside_float(road, tmp_path):
    model, prepared, converted, program, data = road
    path = program.save(tmp_path / "model.pte")
    stages = {"float": model, "prepared": prepared, "converted": converted, "pte": program, "file": path}
    state = {name: t.clone() for name, t in prepared.state_dict().items()}
    model.train()
    found = verify(stages, data, latency_runs=5)
    assert model.training
    model.eval()
    assert all(torch.equal(t, prepared.state_dict()[name]) for name, t in state.items()), "verifying has calibrated"
    assert [s.kind for s in found.stages] == ["float", "observed", "converted", ".pte", ".pte"]
    assert found.examples == 11
    assert found["float"].metric == found["float"].output.top1 == 1.0
    assert found["float"].output.sqnr_db is None
    for stage in found.stages[1:]:
        assert stage.output.agreement == stage.output.top1  # as the targets are what float says
        assert stage.output.drop == pytest.approx(100 * (1 - stage.output.top1))
        assert stage.output.sqnr_db > 15
    assert found["converted"].output.step_sqnr_db > 40  # the simulation and the converted graph are one
    assert found["file"].output.step_sqnr_db == math.inf
    with torch.no_grad():
        outputs = torch.cat([model(x) for x, _ in data]), torch.cat([converted(x) for x, _ in data])
    assert found["converted"].output.sqnr_db == pytest.approx(signal_to_noise(*outputs))
    pte = found["file"]
    assert pte.bytes == path.stat().st_size < found["float"].bytes + 10_000
    assert pte.delegates == {"XnnpackBackend": 1}
    assert sum(pte.kernels.values()) == 0
    assert pte.planned_bytes > 0
    assert pte.latency.rows == found["float"].latency.rows == 1
    assert found["converted"].latency is None
    told = json.loads(found.to_json())
    assert told["stages"][4]["outputs"][0]["step_sqnr_db"] == "inf"
    assert [line.split()[0] for line in str(found).splitlines()[1:6]] == list(stages)


def test_a_planted_fault_shows_at_its_step(road):
    model, prepared, converted, _, data = road
    broken = qf.convert(prepared)
    with torch.no_grad():
        for tensor in (*broken.parameters(), *broken.buffers()):
            if tensor.dtype == torch.int8:
                tensor.copy_(tensor.flip(0))
                break
        else:
            pytest.fail("no integer weight to break")
    found = verify({"float": model, "converted": converted, "broken": broken, "again": broken}, data)
    assert found["converted"].output.step_sqnr_db > 15
    assert found["broken"].output.step_sqnr_db < 10
    assert found["again"].output.step_sqnr_db == math.inf


@pytest.mark.parametrize("rows", [4, 1])
def test_stages_of_one_batch_size_get_it(road, rows):
    """Eleven rows through a program made for four: no row is lost, moved or said twice."""
    model, _, _, _, data = road
    exported = qf.export(model, (data[0][0][:rows],))
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch()
    found = verify({"eager": model, "exported": exported, "core": exported.to_core_aten(), "pte": program}, data)
    assert [s.kind for s in found.stages] == ["float", "float", "float", ".pte"]
    assert all(s.output.sqnr_db > 60 for s in found.stages[1:])
    dynamic = qf.export(model, (data[0][0][:1],), dynamic_batch=4).to_core_aten().to_edge("xnnpack").to_executorch()
    assert verify({"eager": model, "pte": dynamic}, data)["pte"].output.sqnr_db > 60


def test_stages_of_stock_torchao(road):
    """Prepared and converted by torchao with executorch's quantizer, lowered by executorch: all enter."""
    from executorch import exir
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as stock

    model, _, _, _, data = road
    quantizer = stock.XNNPACKQuantizer().set_global(stock.get_symmetric_quantization_config(is_per_channel=True))
    batch = torch.export.Dim("batch")
    prepared = prepare_pt2e(torch.export.export(model, (data[0][0],), dynamic_shapes=({0: batch},)).module(), quantizer)
    with pytest.raises(qf.QuantflowError, match="saw no data"):
        verify({"float": model, "prepared": prepared}, data)
    for x, _ in data:
        prepared(x)
    converted = convert_pt2e(copy.deepcopy(prepared))
    edge = exir.to_edge_transform_and_lower(
        torch.export.export(converted, (data[0][0][:1],)), partitioner=[XnnpackPartitioner()]
    )
    program = qf.Program.from_buffer(edge.to_executorch().buffer)
    assert program.signature.in_spec is None  # it tells nothing of its structure
    found = verify({"float": model, "observed": prepared, "converted": converted, "pte": program}, data)
    assert [s.kind for s in found.stages] == ["float", "observed", "converted", ".pte"]
    assert found["converted"].output.step_sqnr_db > 30
    assert found["pte"].output.step_sqnr_db > 30
    assert found["pte"].output.agreement > 0.5


def test_qat_graphs(road):
    model, _, _, _, data = road
    graph = qf.export(model, (data[0][0],), dynamic_batch=True).module()
    ours = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x for x, _ in data], progress=False)
    ours.train()
    found = verify({"float": model, "fake": ours, "converted": qf.convert(ours)}, data)
    assert ours.training
    assert found["fake"].kind == "fake-quantized"
    assert found["fake"].output.sqnr_db > 10
    assert found["converted"].output.step_sqnr_db > 40
    captured = torch.export.export(model.train(), (data[0][0],)).module()
    model.eval()
    stock = prepare_qat_pt2e(captured, XNNPACKQuantizer())
    with pytest.raises(qf.QuantflowError, match="training mode"):
        verify({"float": model, "stock": stock}, data)


def test_outputs_of_a_structure_by_name():
    model = Structured().eval()
    x, y = torch.randn(5, 8), torch.randn(5, 4)
    exported = qf.export(model, (x,), {"y": y}, dynamic_batch=True)
    program = qf.export(model, (x[:1],), {"y": y[:1]}).to_core_aten().to_edge("xnnpack").to_executorch()
    data = [{"x": x, "y": y, "labels": torch.arange(5) % 4}]

    def mean_sum(outputs, targets):
        assert outputs["parts"][1].shape == (10, 4)
        return float(outputs["sum"].mean()) + len(targets)

    for stages in ({"eager": model, "pte": program}, {"exported": exported, "eager": model, "pte": program}):
        found = verify(stages, data * 2, metric=mean_sum)
        assert [o.output for o in found["pte"].outputs] == ["sum", "parts.0", "parts.1"]
        assert all(o.sqnr_db > 80 for o in found["pte"].outputs)
        assert found.metric == "mean_sum"
        with torch.no_grad():
            assert found["pte"].metric == pytest.approx(float(model(x, y=y)["sum"].mean()) + 10, abs=1e-5)
    assert "parts.1" in str(found)


def test_targets_that_are_no_classes_are_told():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.warns(qf.QuantflowWarning, match="no classes"):
        found = verify({"float": model}, [(x, torch.randn(4, 2))])
    assert found.metric is None
    assert verify({"float": model}, [x]).stages[0].metric is None
    regression = verify({"float": model}, [(x, x[:, :2])], metric=nn.functional.mse_loss)
    with torch.no_grad():
        assert regression.stages[0].metric == pytest.approx(float((model(x) - x[:, :2]).square().mean()))


@pytest.mark.parametrize(
    ("stages", "data", "words"),
    [
        ({}, [torch.randn(2, 3)], "no stages"),
        ([nn.Linear(3, 2)], [torch.randn(2, 3)], "no stages"),
        ({"float": 3}, [torch.randn(2, 3)], "int is no stage"),
        ({"float": nn.Linear(3, 2)}, [], "no data"),
        ({"float": nn.Linear(3, 2)}, torch.randn(2, 3), "no iterable"),
        ({"float": nn.Linear(3, 2)}, [torch.randn(2, 4)], "float: does not run on the data"),
        ({"a": nn.Linear(3, 2), "b": nn.Linear(3, 5)}, [torch.randn(2, 3)], r"b: output has shape \[2, 5\]"),
        ({"a": nn.Linear(3, 2), "pte": "missing.pte"}, [torch.randn(2, 3)], "can't read"),
    ],
)
def test_what_can_not_be_verified(stages, data, words):
    with pytest.raises(qf.QuantflowError, match=words):
        verify(stages, data)


def test_a_metric_that_fails_is_named():
    with pytest.raises(qf.QuantflowError, match="metric: ZeroDivisionError"):
        verify({"float": nn.Linear(3, 2)}, [torch.randn(2, 3)], metric=lambda outputs, targets: 1 / 0)


def test_figures_are_frozen():
    found = verify({"float": nn.Linear(3, 2)}, [torch.randn(2, 3)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.examples = 1
    with pytest.raises(KeyError):
        found["pte"]
