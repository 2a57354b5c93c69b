"""A program that is not what its graph says is mended or refused, and no trial of one takes this process with it."""

import multiprocessing
import os
import signal
import threading

import pytest
import torch
from edges import Function, edge_of
from executorch.backends.xnnpack.partition.config import generic_node_configs as generic
from executorch.exir.dialects._ops import ops
from networks import Behind, CountsCalls
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

import quantflow as qf
from quantflow.delegates.xnnpack import int8
from quantflow.delegates.xnnpack.delegate import Xnnpack
from quantflow.lowering.runtime_check import _difference, _Reference, check
from quantflow.metrics import signal_to_noise
from quantflow.runtime import isolated
from quantflow.signature.signature import Signature

X = torch.randn(2, 4, 8, 8)


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


def test_proving_a_program_leaves_the_state_alone():
    model, x = CountsCalls().eval(), torch.randn(2, 4, 8, 8)
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert model.seen.item() == 0
    assert torch.allclose(program(x), model.conv(x) + 1, atol=1e-4)


def test_a_network_that_cancels_to_nothing_agrees():
    model, x = Behind(lambda y: y - y.mean((2, 3), keepdim=True)), torch.zeros(1, 4, 8, 8)
    model.conv = nn.Conv2d(4, 4, 1)
    qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)


def test_a_program_of_many_sizes_is_called_in_the_least_and_the_greatest():
    rows = torch.export.Dim("rows", min=2, max=9)
    exported = qf.export(nn.Linear(4, 3), (torch.randn(5, 4),), dynamic_shapes=({0: rows},))
    reference = _Reference(exported.program, exported.signature)
    assert [tuple(args[0].shape) for args, _ in reference.inputs] == [(5, 4), (5, 4), (2, 4), (9, 4)]
    assert [tuple(out.shape) for (out,) in reference.outputs] == [(5, 3), (5, 3), (2, 3), (9, 3)]
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert check(program, exported.program) is None
