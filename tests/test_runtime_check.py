"""A program that is not what its graph says is mended or refused, and no trial of one takes this process with it."""

import multiprocessing
import os
import signal
import threading

import pytest
import torch
import torch.utils._pytree as pytree
from executorch.backends.xnnpack.partition.config import generic_node_configs as generic
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.dialects._ops import ops
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

import quantflow as qf
from quantflow.delegates import lowered_modules
from quantflow.delegates.xnnpack import int8
from quantflow.delegates.xnnpack.delegate import Xnnpack
from quantflow.lowering.edge import lower_to_edge
from quantflow.lowering.fault_search import FaultSearch
from quantflow.lowering.runtime_check import _difference, _Reference
from quantflow.metrics import signal_to_noise
from quantflow.runtime import isolated
from quantflow.signature.signature import Signature
from quantizers import XNNPACKQuantizer

X = torch.randn(2, 4, 8, 8)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 4, 1)

    def forward(self, *x):
        return self.function(self, *x)


def edge_of(function, *x, delegate="xnnpack"):
    return qf.export(Function(function), x).to_core_aten().to_edge(delegate)


def planted(monkeypatch, old, new):
    """A pass of the delegate that lowers one operator as another."""

    def swap(module):
        for node in module.graph.nodes:
            if node.target is old:
                node.target = new
        module.recompile()
        return PassResult(module, True)

    passes = Xnnpack.passes
    monkeypatch.setattr(Xnnpack, "passes", lambda self: [*passes(self), swap])


def test_an_operator_that_the_delegate_computes_wrongly_is_named_and_left_out(monkeypatch):
    # The delegate drops the scales of SELU; our partitioner keeps it out.
    monkeypatch.setattr(int8._Elu, "check_constraints", generic.EluConfig.check_constraints)
    edge = edge_of(lambda m, x: m.conv(F.elu(m.conv(x), 2.0)) + F.selu(x), X)
    with pytest.warns(qf.QuantflowWarning, match="elu.*computes it wrongly"):
        program = edge.to_executorch()
    assert signal_to_noise(edge.source.module()(X), program(X)) > 60
    assert program.delegation.delegated["aten::elu"] == 1  # the one that is right stays
    with pytest.raises(qf.QuantflowError, match="elu"):
        edge.to_executorch(strict=True)
    assert signal_to_noise(edge.source.module()(X), edge.to_executorch(check=False)(X)) < 30


def test_a_program_that_can_not_be_mended_is_an_error_unless_asked_for(monkeypatch):
    planted(monkeypatch, ops.edge.aten.add.Tensor, ops.edge.aten.sub.Tensor)
    edge = edge_of(lambda m, x: m.conv(x) + x, X)
    with pytest.raises(qf.QuantflowError, match="dB only"):
        edge.to_executorch()
    assert edge.to_executorch(check=False)(X).shape == X.shape


@pytest.mark.parametrize("function", [lambda m, x: x > 0.5, lambda m, x: (x > 0.5).to(torch.int64) * 3])
def test_outputs_that_are_no_floats_are_compared(monkeypatch, function):
    planted(monkeypatch, ops.edge.aten.gt.Scalar, ops.edge.aten.lt.Scalar)
    with pytest.raises(qf.QuantflowError, match="differs from the graph in"):
        edge_of(function, X).to_executorch()


def test_inputs_that_tell_nothing_do_not_hide_it(monkeypatch):
    planted(monkeypatch, ops.edge.aten.add.Tensor, ops.edge.aten.sub.Tensor)
    zeros = torch.zeros(2, 4, 8, 8)
    with pytest.raises(qf.QuantflowError, match="dB only"):
        edge_of(lambda m, x: x * 2 + x, zeros).to_executorch()


class Amplifies(nn.Module):
    """The order in which 64 products are summed decides over its outputs, with zeros too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return torch.sin(1e7 * self.second(torch.erf(self.first(x))))


def test_rounding_that_a_network_amplifies_is_told_with_an_example_of_zeros():
    zeros = torch.zeros(2, 64)
    program = qf.export(Amplifies(), (zeros,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert program(zeros).shape == (2, 64)


@pytest.mark.parametrize("refused", ["aten_max_pool2d_default", "aten_hardswish_default", "aten_prelu_default"])
def test_what_the_delegate_keeps_whole_is_decomposed_where_it_is_left_out(refused):
    layers = nn.Hardswish(), nn.MaxPool2d(2), nn.PReLU(4), nn.Hardswish(), nn.MaxPool2d(2), nn.PReLU(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *layers).eval()
    core = qf.export(model, (X,)).to_core_aten()
    edge = lower_to_edge(core.program, core.source, "xnnpack", frozenset({refused}))
    assert signal_to_noise(model(X).detach(), edge.to_executorch()(X)) > 100


TIES = torch.randint(0, 3, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda m, x: torch.sort(F.relu(x), 1, True), X.flatten(1)),
        (lambda m, x: (torch.sort(x)[1][:, :3].to(torch.int32).t(), torch.median(x, 0)[1], torch.topk(x, 5)[1]), TIES),
    ],
)
def test_equal_values_come_in_any_order(function, x):
    model = Function(function)
    program = edge_of(function, x).to_executorch()
    for ours, theirs in zip(pytree.tree_leaves(program(x)), pytree.tree_leaves(model(x)), strict=True):
        assert ours.shape == theirs.shape


def test_indices_in_another_order_than_that_of_values_are_refused():
    """Places outside, one place twice, and another value; beside an order of equal values that is another."""
    x = torch.tensor([[3.0, 1.0, 1.0, 2.0]])
    source = torch.export.export(Function(lambda m, x: torch.sort(x)[1]), (x,))
    reference = _Reference(source, Signature.of_program(source))
    theirs = reference.outputs[0][0]
    assert theirs.tolist() == [[1, 2, 3, 0]]
    assert _difference(torch.tensor([[2, 1, 3, 0]]), theirs, reference, 0, 0) == ""
    for wrong in ([1, 1, 3, 0], [1, 2, 0, 3], [1, 2, 3, 4], [-1, 2, 3, 0]):
        assert not reference.ordered(0, 0, torch.tensor([wrong]), theirs), wrong


def test_nothing_passes_for_zeros_that_a_move_makes_uneven():
    x = torch.ones(2, 4)
    source = torch.export.export(Function(lambda m, x: x - x.mean(1, keepdim=True)), (x,))
    reference = _Reference(source, Signature.of_program(source))
    theirs = reference.outputs[0][0]
    assert not theirs.any()
    assert _difference(theirs + 1e-6, theirs, reference, 0, 0) == ""
    assert "dB" in _difference(theirs + 5.0, theirs, reference, 0, 0)


def test_an_example_that_was_computed_with_gradients():
    features = nn.Linear(4, 4)(torch.randn(2, 4))
    model = nn.Linear(4, 4)
    program = qf.export(model, (features,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert torch.allclose(program(features.detach()), model(features), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.edge.*no delegate runs it")
def test_conversions_around_a_layer_that_is_left_out_are_done():
    """Whoever asks whether the delegate takes a layer tags them as a part of its kernel."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    core = qf.export(converted, (x,)).to_core_aten()
    for refused in ({"aten_linear_default"}, {"aten_linear_default", "aten_linear_default_1"}):
        program = lower_to_edge(core.program, core.source, "xnnpack", frozenset(refused)).to_executorch(check=False)
        assert signal_to_noise(converted(x).detach(), program(x)) > 60


class Counter(nn.Module):
    """State that shows from the second call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen.add_(1.0)
        return x * self.seen * (self.seen - 1.0)


def test_state_is_compared_over_calls(monkeypatch):
    edge = qf.export(Counter(), (X,)).to_core_aten().to_edge("xnnpack")
    program = edge.to_executorch()
    twin = Counter()
    for _ in range(3):
        assert torch.allclose(program(X), twin(X), atol=1e-5)
    planted(monkeypatch, ops.edge.aten.add.Tensor, ops.edge.aten.mul.Tensor)  # the counter stays at zero
    with pytest.raises(qf.QuantflowError, match="at call"):
        qf.export(Counter(), (X,)).to_core_aten().to_edge("xnnpack").to_executorch()


@pytest.mark.parametrize("culprit", range(5))
def test_the_first_operator_with_which_a_program_goes_wrong_is_found(culprit):
    edge = edge_of(lambda m, x: torch.tanh(torch.exp(torch.sigmoid(m.conv(x)))) * x, X).manager.exported_program()
    inside = [node for _, nodes in lowered_modules(edge.graph_module) for node in nodes]
    assert len(inside) == 5
    search = FaultSearch()
    name = inside[culprit].name
    assert search.together(inside, lambda out: name not in out) == {name}
    assert search.together(inside, lambda out: True) == set()
    assert FaultSearch(seconds=-1.0).together(inside, lambda out: name not in out) == set()


def compiler_fails(monkeypatch, *operators):
    """The delegate's compiler raises, in words that name nothing, for a program that has all of these operators."""
    compiled = XnnpackBackend.preprocess

    def preprocess(edge_program, compile_specs):
        if set(operators) <= {node.target for node in edge_program.graph.nodes}:
            raise AssertionError("not compatible")
        return compiled(edge_program, compile_specs)

    monkeypatch.setattr(XnnpackBackend, "preprocess", staticmethod(preprocess))


@pytest.mark.parametrize(
    "operators", [[ops.edge.aten.tanh.default], [ops.edge.aten.tanh.default, ops.edge.aten.exp.default]]
)
def test_an_operator_on_which_the_compiler_of_the_delegate_fails_is_named_and_left_out(monkeypatch, operators):
    compiler_fails(monkeypatch, *operators)
    with pytest.warns(
        qf.QuantflowWarning, match=r"tanh.*the delegate's compiler fails: AssertionError: not compatible"
    ):
        edge = edge_of(lambda m, x: torch.tanh(torch.exp(m.conv(x))) * x, X)
    assert edge.delegation().portable == {"aten::tanh": 1}
    assert edge.to_executorch()(X).shape == X.shape


def test_layers_on_which_the_compiler_of_a_foreign_delegate_fails_are_named(monkeypatch):
    compiler_fails(monkeypatch, ops.edge.aten.tanh.default)
    with pytest.raises(qf.QuantflowError, match=r"conv .*tanh.*not compatible"):
        edge_of(lambda m, x: torch.tanh(m.conv(x)), X, delegate=XnnpackPartitioner())


def test_a_crash_of_the_runtime_is_a_finding():
    program = edge_of(lambda m, x: m.conv(x), X).to_executorch()
    worker = isolated._worker()
    os.kill(worker.pid, signal.SIGSTOP)  # it dies while it is asked
    threading.Timer(0.5, lambda: (os.kill(worker.pid, signal.SIGABRT), os.kill(worker.pid, signal.SIGCONT))).start()
    assert isolated.run(program.buffer, [[X]]).failure.startswith("the runtime crashes on it: SIGABRT")
    trial = isolated.run(program.buffer, [[X]])
    assert torch.allclose(trial.outputs[0][0], program(X), atol=1e-6)


def test_what_does_not_end_is_ended():
    program = edge_of(lambda m, x: m.conv(x), X).to_executorch()
    worker = isolated._worker()
    os.kill(worker.pid, signal.SIGSTOP)
    assert "no end after 1 s" in isolated.run(program.buffer, [[X]], seconds=1.0).failure
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
    assert not isolated.run(program.buffer, [[X]]).failure


def test_a_fork_has_a_child_of_the_server_of_its_own():
    program = edge_of(lambda m, x: m.conv(x), X).to_executorch()
    served = isolated._worker().pid
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def tried():
        outputs = isolated.run(program.buffer, [[X]]).outputs
        sender.send((isolated._worker().pid, outputs[0][0].tolist()))

    fork = context.Process(target=tried)
    fork.start()
    pid, found = receiver.recv()
    fork.join(60)
    assert pid != served
    assert torch.allclose(torch.tensor(found), program(X), atol=1e-6)
    assert isolated._worker().pid == served


@pytest.fixture
def nothing_rewritten(monkeypatch):
    monkeypatch.setattr("quantflow.delegates.delegate.Delegate.rewrite", lambda self, graph: None)


def test_a_missing_kernel_is_named(nothing_rewritten):
    with pytest.raises(qf.QuantflowError, match=r"sort.*no kernels") as caught:
        edge_of(lambda m, x: torch.sort(x)[0], X, delegate=None).to_executorch()
    assert "to_edge(None)" not in str(caught.value)


def test_a_kernel_that_refuses_its_arguments_is_named(nothing_rewritten):
    with pytest.raises(qf.QuantflowError, match=r"aten::convolution.*3-D or 4-D"):
        qf.export(nn.Conv3d(2, 2, 1), (torch.randn(1, 2, 3, 3, 3),)).to_core_aten().to_edge(None).to_executorch()


def test_maxima_over_a_dimension_that_goes_stay_out_of_the_delegate():
    edge = edge_of(lambda m, x: m.conv(x).max(3)[0] + m.conv(x).max(3, keepdim=True)[0][..., 0], X)
    assert edge.delegation().portable["aten::max.dim"] == 1
    assert edge.to_executorch()(X).shape == X.shape[:3]


def test_a_call_of_which_no_program_can_be_made_is_left_out_of_the_search(monkeypatch):
    edge = edge_of(lambda m, x: torch.tanh(m.conv(x)), X)

    def fails(self, *args, **kwargs):
        raise AssertionError("Number of inputs changed after transformation")

    monkeypatch.setattr(LoweredBackendModule, "buffer", fails)
    assert FaultSearch().alone(edge.manager.exported_program(), [X]) == set()
    assert FaultSearch().alone(edge.manager.exported_program(), None) == set()
