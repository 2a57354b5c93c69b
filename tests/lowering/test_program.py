"""Programs: on the runtime, on disk, in the model's own structure, and what they refuse."""

import subprocess
import sys

import pytest
import torch
from networks import ConvNet, Structured, randomize_statistics, sqnr
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def structured():
    batch = torch.export.Dim("batch", min=1, max=6)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    model = Structured().eval()
    exported = qf.export(model, (torch.randn(2, 8),), {"y": torch.randn(2, 4)}, dynamic_shapes=shapes)
    return model, exported.to_core_aten().to_edge("xnnpack").to_executorch()


@pytest.mark.parametrize("delegate", [None, "xnnpack"])
def test_float_path(delegate):
    model = randomize_statistics(ConvNet()).eval()
    program = qf.export(model, (X,)).to_core_aten().to_edge(delegate).to_executorch()
    assert torch.allclose(program(X), model(X), atol=1e-4)
    assert program.methods == ("forward",)
    assert program.delegation.fraction == (1.0 if delegate else 0.0)


def test_quantized_on_portable_kernels():
    model = randomize_statistics(ConvNet()).eval()
    prepared = qf.prepare(qf.export(model, (X,)).module(), XNNPACKQuantizer())
    converted = qf.convert(qf.calibrate(prepared, [X], progress=False))
    program = qf.export(converted, (X,)).to_core_aten().to_edge(None).to_executorch()
    assert sqnr(converted(X).detach(), program(X)) > 40


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_structure_and_dynamic_batch(structured, batch):
    model, program = structured
    x, y = torch.randn(batch, 8), torch.randn(batch, 4)
    ours, eager = program(x, y=y), model(x, y=y)
    assert ours.keys() == eager.keys()
    assert isinstance(ours["parts"], tuple)
    assert torch.allclose(ours["sum"], eager["sum"], atol=1e-5)
    assert torch.allclose(ours["parts"][1], eager["parts"][1], atol=1e-5)


def test_saved_and_loaded_is_the_same(structured, tmp_path):
    _, program = structured
    loaded = qf.load(program.save(tmp_path / "model.pte"))
    assert loaded.buffer == program.buffer
    assert loaded.signature == program.signature
    x, y = torch.randn(3, 8), torch.randn(3, 4)
    assert torch.equal(loaded(x, y=y)["parts"][0], program(x, y=y)["parts"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["model.pte"]


def test_a_program_from_elsewhere_loads():
    from executorch.exir import to_edge

    buffer = to_edge(torch.export.export(nn.Linear(3, 2), (torch.randn(4, 3),))).to_executorch().buffer
    program = qf.Program.from_buffer(buffer)
    assert program(torch.randn(4, 3)).shape == (4, 2)
    with pytest.raises(qf.QuantflowError):
        program(torch.randn(4, 3, 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p(torch.randn(7, 8), y=torch.randn(7, 4)),
        lambda p: p(torch.randn(2, 8), y=torch.randn(3, 4)),
        lambda p: p(torch.randn(2, 8).half(), y=torch.randn(2, 4)),
        lambda p: p(torch.randn(2, 8)),
        lambda p: p([1.0], y=torch.randn(2, 4)),
    ],
)
def test_wrong_inputs_are_refused_before_the_runtime(structured, call):
    _, program = structured
    with pytest.raises(qf.QuantflowError) as caught:
        call(program)
    assert caught.value.stage == "runtime"
    assert "execution failed" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a program at all", b"\x00" * 64])
def test_what_is_no_program_is_refused(tmp_path, content):
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(qf.QuantflowError, match="not an ExecuTorch program"):
        qf.load(path)
    with pytest.raises(qf.QuantflowError, match="can't read"):
        qf.load(tmp_path / "missing.pte")


def test_a_truncated_program_is_refused(structured, tmp_path):
    path = tmp_path / "model.pte"
    path.write_bytes(structured[1].buffer[: len(structured[1].buffer) // 3])
    with pytest.raises(qf.QuantflowError) as caught:
        qf.load(path)
    assert caught.value.stage == "runtime"


def test_saving_where_one_can_not(structured, tmp_path):
    with pytest.raises(qf.QuantflowError, match="can't write"):
        structured[1].save(tmp_path / "missing" / "model.pte")


def test_unbounded_batch_is_named():
    exported = qf.export(nn.Linear(3, 2), (torch.randn(1, 3),), dynamic_batch=True)
    with pytest.raises(qf.QuantflowError, match="no upper bound") as caught:
        exported.to_core_aten().to_edge().to_executorch()
    assert caught.value.stage == "executorch"
    program = qf.export(nn.Linear(3, 2), (torch.randn(1, 3),), dynamic_batch=5).to_core_aten().to_edge().to_executorch()
    assert program(torch.randn(4, 3)).shape == (4, 2)


def test_a_fresh_process_has_the_quantized_kernels(tmp_path):
    """A program whose quantize operators stay outside the delegate runs in a process that only loads it."""
    prepared = qf.prepare(qf.export(nn.Linear(3, 2), (torch.randn(4, 3),)).module(), XNNPACKQuantizer())
    converted = qf.convert(qf.calibrate(prepared, [torch.randn(4, 3)], progress=False))
    path = tmp_path / "model.pte"
    qf.export(converted, (torch.randn(4, 3),)).to_core_aten().to_edge(None).to_executorch().save(path)
    code = f"import torch, quantflow as qf; print(tuple(qf.load({str(path)!r})(torch.ones(4, 3)).shape))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "(4, 2)" in shown.stdout
