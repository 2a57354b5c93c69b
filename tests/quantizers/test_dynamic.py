"""Dynamic schemes: one range for each row, chosen at run time, and what else reads the tensors they are chosen for."""

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

import quantflow as qf
from quantflow.analysis.layers import observers_in
from quantflow.graph.parameters import is_constant
from quantflow.metrics import signal_to_noise as sqnr
from quantflow.observers import MinMaxObserver
from quantflow.observers.observation import observer_of
from quantflow.simulation.network import Simulation
from quantflow.simulation.partial import PartialNetwork
from quantizers import DYNAMIC_INT8, DYNAMIC_W4, INT8, XNNPACKQuantizer

DYNAMIC = pytest.mark.parametrize("scheme", [DYNAMIC_INT8, DYNAMIC_W4], ids=str)


class PostNorm(nn.Module):
    """The feed-forward half of a post-norm transformer layer: a dropout whose value a linear layer and the residual read."""

    def __init__(self, width=32):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.drop(x)
        return self.norm(x + self.drop(self.second(torch.relu(self.first(x)))))


def prepare(model, x, quantizer, **given):
    prepared = qf.prepare(qf.export(model, (x,)).module(), quantizer, **given)
    return qf.calibrate(prepared, [x], progress=False)


def lower(graph, x, delegate="xnnpack"):
    return qf.export(graph, (x,)).to_core_aten().to_edge(delegate).to_executorch(strict=True)


def observed(prepared):
    """The activations that are observed, and who reads them so."""
    calls = [n for n in prepared.graph.nodes if observer_of(n, prepared) is not None and not is_constant(n.args[0])]
    return [(call.args[0].name, sorted(user.name for user in call.users)) for call in calls]


@DYNAMIC
def test_a_post_norm_transformer(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), PostNorm()).eval()
    x = torch.randn(2, 7, 32)
    converted = qf.convert(prepare(model, x, XNNPACKQuantizer(scheme)))
    program = lower(converted, x)
    assert sqnr(converted(x).detach(), program(x)) > 35
    assert sqnr(model(x).detach(), program(x)) > (30 if scheme is DYNAMIC_INT8 else 12)


@pytest.mark.parametrize("scheme", [INT8, DYNAMIC_INT8, DYNAMIC_W4], ids=str)
def test_a_residual_behind_a_dropout_is_not_quantized_unasked(scheme):
    """The dropout's value is read by a layer in integers and by a sum in float: only the layer's is on a grid."""
    model, x = PostNorm().eval(), torch.randn(2, 7, 32)
    prepared = prepare(model, x, XNNPACKQuantizer(None, overrides={"first": scheme}))
    assert ("dropout", ["linear"]) in observed(prepared)
    assert all(reader == ["linear"] for name, reader in observed(prepared) if name in ("x", "dropout"))
    converted = qf.convert(prepared)
    add = next(n for n in converted.graph.nodes if n.name == "add")
    assert add.args[0].op == "placeholder"
    expected = converted(x).detach()
    assert sqnr(expected, lower(converted, x)(x)) > 35


def test_where_all_readers_of_a_dropout_agree_integers_meet_them():
    """Then one grid before the dropout serves all, and no further one is needed behind it."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.before = nn.Dropout(0.1), nn.Linear(8, 8)
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.drop(self.drop(self.before(x)))
            return self.left(x) + self.right(x)

    x = torch.randn(3, 8)
    prepared = prepare(Branches().eval(), x, XNNPACKQuantizer())
    assert ("linear", ["dropout"]) in observed(prepared)
    assert not [name for name, _ in observed(prepared) if name.startswith("dropout")]


def test_a_dropout_behind_integers_takes_their_grid_though_a_float_operator_reads_it():
    """What a layer in integers puts out lies on its grid for all readers: another behind the dropout would round twice."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.before, self.after = nn.Dropout(0.1), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.drop(self.before(x))
            return self.after(x), x.sin()

    x = torch.randn(3, 8)
    prepared = prepare(Split().eval(), x, XNNPACKQuantizer())
    assert not [name for name, _ in observed(prepared) if name.startswith("dropout")]


def rows(*shape):
    """Rows of very different ranges."""
    return torch.randn(*shape) * torch.logspace(-2, 2, shape[-2])[:, None] if len(shape) > 1 else torch.randn(*shape)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).eval()


def worst_row(expected, found):
    expected, found = (t.detach().reshape(-1, t.shape[-1]) for t in (expected, found))
    return min(sqnr(ours, theirs) for ours, theirs in zip(expected, found, strict=True))


RANKS = pytest.mark.parametrize("shape", [(64,), (9, 64), (2, 9, 64), (2, 3, 9, 64)], ids=len)


@pytest.mark.parametrize(
    ("scheme", "shape", "delegate"),
    [
        (DYNAMIC_INT8, (64,), "xnnpack"),
        (DYNAMIC_INT8, (9, 64), "xnnpack"),
        (DYNAMIC_INT8, (2, 3, 9, 64), "xnnpack"),
        (DYNAMIC_W4, (2, 9, 64), "xnnpack"),
        (DYNAMIC_W4, (2, 3, 9, 64), "xnnpack"),
        (DYNAMIC_INT8, (2, 9, 64), None),  # executorch has no portable kernel for groups of weights
    ],
    ids=str,
)
def test_the_graph_has_a_range_for_each_row_as_the_runtime_does(scheme, shape, delegate):
    model, x = network(), rows(*shape)
    converted = qf.convert(prepare(model, x, XNNPACKQuantizer(scheme)))
    program = lower(converted, x, delegate)
    assert worst_row(converted(x), program(x)) > 60
    assert program.delegation.fraction == (1.0 if delegate else 0.0)


@DYNAMIC
@pytest.mark.parametrize("shape", [(9, 64), (2, 9, 64), (2, 3, 9, 64)], ids=len)
def test_rows_do_not_see_each_other(scheme, shape):
    model, x = network(), rows(*shape)
    converted = qf.convert(prepare(model, x, XNNPACKQuantizer(scheme)))
    other = x.clone()
    other[..., 0, :] *= 1000
    torch.testing.assert_close(converted(other)[..., 1:, :], converted(x)[..., 1:, :], rtol=0, atol=0)


@DYNAMIC
@RANKS
def test_what_recover_sensitivity_and_search_judge_by_is_the_converted_graph(scheme, shape):
    model, x = network(), rows(*shape)
    prepared = prepare(model, x, XNNPACKQuantizer(scheme))
    expected = qf.convert(prepared)(x)
    assert worst_row(expected, Simulation(prepared)(x)[0]) > 60
    assert worst_row(expected, PartialNetwork(prepared, (x,), observers_in(prepared)).returned[0]) > 60
    judged = qf.sensitivity(prepared, [x], progress=False).all_integers
    assert judged == pytest.approx(sqnr(model(x).detach(), expected.detach()), abs=0.1)
    step = qf.recover(prepared, [x], progress=False).steps[0]
    assert step.sqnr == pytest.approx(judged, abs=0.1)


@RANKS
def test_training_rounds_as_the_converted_graph_does(shape):
    model, x = network(), rows(*shape)
    prepared = prepare(model, x, XNNPACKQuantizer(DYNAMIC_INT8), qat=True)
    assert worst_row(qf.convert(prepared)(x), prepared(x)) > 60
    ours, eager = (x.clone().requires_grad_() for _ in range(2))
    prepared.train()(ours).sum().backward()
    model(eager).sum().backward()
    assert worst_row(eager.grad, ours.grad) > 20


def test_a_graph_that_stock_torchao_prepared():
    model, x = network(), rows(9, 64)
    quantizer = Stock().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    converted = qf.convert(prepared)
    assert worst_row(converted(x), lower(converted, x)(x)) > 60
    assert worst_row(converted(x), Simulation(prepared)(x)[0]) > 60


def test_diagnosis_finds_no_fault_in_a_grid_for_each_row():
    """What rounding each row costs is what it must cost."""
    model, x = network(), rows(9, 64)
    graph = qf.export(model, (x,)).module()
    found = qf.diagnose(graph, prepare(model, x, XNNPACKQuantizer(DYNAMIC_INT8)), [x], progress=False)
    inputs = next(errors for errors in found.layers if errors.operator == "input")
    assert inputs.excess == pytest.approx(0.0, abs=1e-9)


class DynamicOutputs(Quantizer):
    """A range at run time for what a convolution puts out, whoever reads it."""

    def annotate(self, model):
        spec = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=MinMaxObserver,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            is_dynamic=True,
        )
        for node in model.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
            node.meta["quantization_annotation"] = QuantizationAnnotation(output_qspec=spec, _annotated=True)
        return model

    def validate(self, model):
        pass


def test_training_rounds_an_annotated_output_as_the_converted_graph_does():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6) * torch.logspace(-2, 0, 6)[:, None]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)).eval()
    prepared = prepare(model, x, DynamicOutputs(), qat=True).eval()
    with torch.no_grad():
        assert torch.equal(prepared(x), qf.convert(prepared)(x))
