"""Fast lowering: the same bytes, nothing left behind, and executorch's own lowering where it fails."""

import copy
import logging
import threading
import time

import pytest
import torch
from executorch import exir
from executorch.exir import pass_base
from executorch.exir.verification import verifier
from networks import ConvNet, randomize_statistics
from processes import in_a_fork
from torch import nn
from torch.fx import GraphModule

import quantflow as qf
from quantflow.delegates import resolve
from quantflow.lowering.core_aten import straight_to_edge
from quantflow.upstream.lowering.fast_lowering import fast_lowering, run_fast
from quantflow.upstream.versions import SWITCH, obstacle
from quantizers import DYNAMIC_INT8, INT8, XNNPACKQuantizer

pytestmark = pytest.mark.slow


class Attention(nn.Module):
    """Masked attention: what a pattern of executorch matches."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", torch.zeros(5, 5))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2) * 0.3 + self.mask, -1) @ v


class Mixed(nn.Module):
    """Numbers among tensors, integers in float, a permutation and a bilinear upsampling."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        y = nn.functional.interpolate(self.conv(x) * 2, scale_factor=2, mode="bilinear")
        return self.linear(y.permute(0, 2, 3, 1)) + torch.arange(4) / 3


NETWORKS = {
    "convnet int8": (ConvNet(), torch.randn(2, 3, 16, 16), INT8),
    "convnet float": (ConvNet(), torch.randn(2, 3, 16, 16), None),
    "dynamic int8": (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 8), DYNAMIC_INT8),
    "attention": (Attention(), torch.randn(2, 5, 8), None),
    "mixed": (Mixed(), torch.randn(2, 3, 8, 8), INT8),
}


def exported(name):
    model, x, scheme = NETWORKS[name]
    graph = qf.export(randomize_statistics(model).eval(), (x,)).module()
    if scheme is not None:
        graph = qf.convert(qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(scheme)), [x], progress=False))
    return qf.export(graph, (x,)).program


def lowered(program):
    delegate = resolve("xnnpack")
    return exir.to_edge_transform_and_lower(
        program, transform_passes=delegate.passes(), partitioner=delegate.partitioners()
    ).to_executorch()


@pytest.mark.skipif(obstacle() is not None, reason="measured with other versions")
@pytest.mark.parametrize("name", NETWORKS)
def test_same_bytes(name):
    program = exported(name)
    stock = lowered(copy.deepcopy(program)).buffer
    with fast_lowering() as fast:
        assert fast
        assert lowered(program).buffer == stock
    assert lowered(program).buffer == stock


@pytest.mark.parametrize("name", ["convnet int8", "attention"])
def test_leaving_core_aten_out_gives_the_same_bytes(name):
    whole = qf.export(exported(name))
    usual = whole.to_core_aten().to_edge("xnnpack").to_executorch()
    assert straight_to_edge(whole.program, "xnnpack").to_executorch().buffer == usual.buffer


def test_leaves_nothing_behind():
    before = GraphModule.recompile, GraphModule.code, pass_base._ExportPassBase.call
    with pytest.raises(ZeroDivisionError), fast_lowering():
        raise ZeroDivisionError
    assert (GraphModule.recompile, GraphModule.code, pass_base._ExportPassBase.call) == before


@pytest.mark.skipif(obstacle() is not None, reason="measured with other versions")
def test_what_fails_is_done_the_stock_way_and_told():
    calls = []

    def lower():
        calls.append(GraphModule.recompile)
        if len(calls) == 1:
            raise RuntimeError("only when fast")
        return "done"

    with pytest.warns(qf.QuantflowWarning, match=r"fast lowering failed.*\(RuntimeError: only when fast\)"):
        assert run_fast(lower) == "done"
    assert calls[0] is not calls[1]


@pytest.mark.skipif(obstacle() is not None, reason="measured with other versions")
def test_a_slip_beneath_executorch_is_done_the_stock_way(monkeypatch):
    """As it would be where a graph that was made fast is not what executorch expects."""
    program = exported("convnet int8")
    stock = lowered(copy.deepcopy(program)).buffer
    calls = []

    def copied(*args):
        calls.append(1)
        raise RuntimeError("not as it was")

    monkeypatch.setattr("quantflow.upstream.lowering.retraces._copy", copied)
    with pytest.warns(qf.QuantflowWarning, match="not as it was"):
        assert run_fast(lambda: lowered(program)).buffer == stock
    assert len(calls) == 1


class Decomposed(nn.Module):
    """Singular values: no operator of the core set."""

    def forward(self, x):
        return torch.linalg.svd(x)[1]


def test_what_executorch_refuses_is_refused_once():
    program = torch.export.export(Decomposed(), (torch.randn(3, 3),))
    calls = []

    def lower():
        calls.append(1)
        return lowered(program)

    with pytest.raises(Exception, match="not in Core ATen opset"):
        run_fast(lower)
    assert len(calls) == 1


def test_other_versions_are_left_alone(monkeypatch, caplog):
    monkeypatch.setattr("quantflow.upstream.lowering.fast_lowering.obstacle", lambda: "other versions")
    assert_not_used("other versions", caplog)


def test_the_switch(monkeypatch, caplog):
    monkeypatch.setenv(SWITCH, "0")
    assert_not_used("QUANTFLOW_FAST_LOWERING=0 switches it off", caplog)


@pytest.mark.skipif(obstacle() is not None, reason="measured with other versions")
def test_without_a_name_nothing_is_replaced(monkeypatch, caplog):
    monkeypatch.delattr(verifier, "EdgeOpArgValidator")
    assert_not_used("EdgeOpArgValidator", caplog)


def assert_not_used(reason, caplog):
    recompile = GraphModule.recompile
    with caplog.at_level(logging.INFO, "quantflow"), fast_lowering() as fast:
        assert not fast
        assert GraphModule.recompile is recompile
    assert [record.name for record in caplog.records if reason in record.getMessage()] == ["quantflow"]


def test_in_a_fork_nothing_stays_replaced_by_another_thread():
    stock, entered = GraphModule.recompile, threading.Event()

    def lower():
        with fast_lowering():
            entered.set()
            time.sleep(0.3)

    def is_stock():
        found = GraphModule.recompile is stock
        with fast_lowering():
            return found

    thread = threading.Thread(target=lower)
    thread.start()
    entered.wait()
    assert in_a_fork(is_stock) == "True"
    thread.join()
    with fast_lowering():
        assert in_a_fork(is_stock) == "False"  # a fork in the midst of it goes on with it
