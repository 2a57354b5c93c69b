"""Networks in half precision: captured, quantized and lowered, with inputs and outputs as they were."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.half_precision import compute_in_float32
from quantflow.metrics import signal_to_noise as sqnr
from quantizers import DYNAMIC_INT8, INT8, XNNPACKQuantizer


class Images(nn.Module):
    """Convolutions, a constant in half precision, and an output that is the input itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.deep = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = F.hardswish(self.deep(F.relu(self.bn(self.conv(x))))).mean((2, 3))
        ramp = torch.arange(4, dtype=x.dtype)
        return torch.softmax(self.head(y).float(), -1).to(x.dtype) + ramp, x


class Words(nn.Module):
    """An embedding, whose table only a lookup reads, and attention."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(400, 32), nn.Linear(32, 4)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

    def forward(self, i):
        return self.head(self.layer(self.words(i)).mean(1)), self.words(i)


class Remembers(nn.Module):
    """State in half precision."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("last", torch.ones(1, 8))

    def forward(self, x):
        y = self.linear(x) + self.last
        self.last.copy_(x * 0.5)
        return y, self.last


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
NETWORKS = {
    "images": (Images, lambda dtype: torch.randn(1, 3, 12, 12).to(dtype)),
    "words": (Words, lambda dtype: torch.randint(0, 400, (1, 6))),
    "state": (Remembers, lambda dtype: torch.randn(1, 8).to(dtype)),
}


def networks(name, dtype):
    torch.manual_seed(0)
    make, given = NETWORKS[name]
    half = make().eval().to(dtype)
    return half, copy.deepcopy(half).float(), [given(dtype) for _ in range(4)]


def wide(x):
    return x.float() if x.is_floating_point() else x


@HALF
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_computes_what_half_precision_rounds(name, dtype):
    half, exact, data = networks(name, dtype)
    graph = qf.export(half, (data[0],)).module().eval()
    assert compute_in_float32(graph) == {dtype}
    graph.graph.lint()
    graph.recompile()
    for x in data:
        with torch.no_grad():
            found, expected = graph(x), exact(wide(x))
        assert [y.dtype for y in found] == [dtype] * 2
        assert all(torch.equal(ours, theirs.to(dtype)) for ours, theirs in zip(found, expected, strict=True))
    assert compute_in_float32(graph) == set()


def test_a_table_of_an_embedding_keeps_its_size():
    half, _, data = networks("words", torch.float16)
    graph = qf.export(half, (data[0],)).module()
    compute_in_float32(graph)
    assert graph.words.weight.dtype == torch.float16
    assert graph.head.weight.dtype == torch.float32


@pytest.mark.slow
@HALF
@pytest.mark.parametrize("scheme", [None, INT8, DYNAMIC_INT8], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*:quantflow.QuantflowWarning")
def test_a_network_in_half_precision_runs(name, scheme, dtype):
    half, exact, data = networks(name, dtype)
    graph = qf.export(half, (data[0],)).module().eval()
    if scheme is not None:
        quantizer = XNNPACKQuantizer(scheme)
        planned = quantizer.plan(graph).calls
        graph = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), data, progress=False))
    program = qf.export(copy.deepcopy(graph), (data[0],)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    if scheme is not None:
        assert program.delegation.calls == planned
    for x in data:
        with torch.no_grad():
            found, expected = program(x), exact(wide(x))
        assert [y.dtype for y in found] == [dtype] * 2
        assert sqnr(expected[0], found[0].float()) > (25 if scheme else 35)


@pytest.mark.parametrize(("dtype", "words"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_what_becomes_float32_is_said(dtype, words):
    half, _, data = networks("images", dtype)
    exported = qf.export(half, (data[0],))
    with pytest.warns(qf.QuantflowWarning, match=f"the graph computes in {words}"):
        qf.prepare(exported.module(), XNNPACKQuantizer())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        exported.to_core_aten().to_edge("xnnpack")
    assert any("bfloat16 has no kernels" in str(w.message) for w in said) == (dtype is torch.bfloat16)
