"""What a loader gives, taken apart: inputs where the model has them, and a target where there is one."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import quantflow as qf
from quantflow.data.batches import batches
from quantizers import XNNPACKQuantizer

X, Z, Y = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])


class One(nn.Module):
    def forward(self, x):
        return x + 1


class Two(nn.Module):
    def forward(self, x, z):
        return x + z


class Pair(nn.Module):
    """One input that is a tuple."""

    def forward(self, pair):
        return pair[0] + pair[1]


class Nested(nn.Module):
    """A tuple, and a tensor beside it."""

    def forward(self, pair, y):
        return pair[0] + pair[1] + y


class Named(nn.Module):
    """One input that is a dict."""

    def forward(self, given):
        return given["x"] + given["z"]


class Keyword(nn.Module):
    def forward(self, x, *, z):
        return x + z


MODELS = {
    One: ((X,), {}),
    Two: ((X, Z), {}),
    Pair: (((X, Z),), {}),
    Nested: (((X, Z), X), {}),
    Named: (({"x": X, "z": Z},), {}),
    Keyword: ((X,), {"z": Z}),
}


def taken(model, raw, inputs=None):
    args, kwargs = MODELS[model]
    graph = qf.export(model(), args, kwargs).module()
    (batch,) = batches([raw], graph, stage="calibrate", inputs=inputs)
    graph(*batch.args, **batch.kwargs)
    return batch


CASES = {
    # what the loader gives, how inputs are picked out of it, and its target
    "a dict with labels": (Two, {"x": X, "z": Z, "labels": Y}, lambda b: {"x": b["x"], "z": b["z"]}, Y),
    "a dict without": (Two, {"x": X, "z": Z}, lambda b: (b["x"], b["z"]), None),
    "an unlabelled pair": (Two, (X, Z), lambda b: (b[0], b[1]), None),
    "an unlabelled pair by name": (Two, (X, Z), lambda b: {"x": b[0], "z": b[1]}, None),
    "an unlabelled pair, converted": (Two, (X.double(), Z.double()), lambda b: [t.float() for t in b], None),
    "an unlabelled pair, the last picked": (One, ("name", X), lambda b: b[1], None),
    "a labelled pair": (One, (X, Y), lambda b: b[0], Y),
    "a labelled pair, picked twice": (Two, (X, Y), lambda b: (b[0], b[0].flip(0)), Y),
    "what is to be given back": (One, (X, X), lambda b: b[0], X),
    "the next token": (One, (torch.arange(15.0).reshape(3, 5)[:, :-1], torch.arange(15.0).reshape(3, 5)[:, 1:]),
                       lambda b: b[0], torch.arange(15.0).reshape(3, 5)[:, 1:]),
    "nested and labelled": (Two, ((X, Z), Y), lambda b: b[0], Y),
    "inputs, something, a target": (One, [X, "name", Y], lambda b: b[0], Y),
    # without picking
    "two inputs": (Two, (X, Z), None, None),
    "two inputs and a target": (Two, (X, Z, Y), None, Y),
    "two inputs in a pair with a target": (Two, [(X, Z), Y], None, Y),
    "one input and a target": (One, [X, Y], None, Y),
    "a tuple that is one input": (Pair, (X, Z), None, None),
    "a tuple that is one input, and a target": (Pair, ((X, Z), Y), None, Y),
    "a tuple beside a tensor": (Nested, ((X, Z), X), None, None),
    "a tuple beside a tensor, and a target": (Nested, ((X, Z), X, Y), None, Y),
    "a dict that is one input": (Named, {"x": X, "z": Z}, None, None),
    "a dict that is one input, and a target": (Named, ({"x": X, "z": Z}, Y), None, Y),
    "keyword inputs": (Keyword, {"x": X, "z": Z, "labels": Y}, None, Y),
    "keyword inputs in a pair": (Keyword, ({"x": X, "z": Z}, Y), None, Y),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_target_is_what_is_left(case):
    model, raw, inputs, target = CASES[case]
    found = taken(model, raw, inputs).target
    assert found is target or torch.equal(found, target)


@pytest.mark.parametrize(
    ("model", "raw", "words"),
    [(One, (X, Z, Y), "can't tell the inputs"), (Two, (X, Z[:2]), "shape"), (One, X.numpy(), "numpy")],
)
def test_what_does_not_fit_is_named(model, raw, words):
    with pytest.raises(qf.QuantflowError, match=words) as caught:
        taken(model, raw)
    assert "batch 0" in caught.value.node


class Stream(IterableDataset):
    """Batches without a length."""

    def __iter__(self):
        return iter([(X, Y)] * 3)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


def test_a_loader_that_does_not_know_its_length_is_a_loader():
    data, graph = DataLoader(Stream(), batch_size=None), qf.export(Linear(), (X,)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(), qat=True), data, progress=False)
    assert len(qf.train(prepared, data, epochs=2, progress=False).loss) == 2
    assert qf.verify({"prepared": prepared}, data, latency_runs=0, progress=False).examples == 9
    assert qf.diagnose(graph, prepared, data, progress=False)


@pytest.mark.parametrize("most", [-1, 0, 1.5])
def test_a_limit_that_is_no_number_of_batches_is_named(most):
    graph = qf.export(Linear(), (X,)).module()
    with pytest.raises(qf.QuantflowError, match=f"max_batches: {most} batches show nothing"):
        qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [X], max_batches=most, progress=False)
    with pytest.raises(qf.QuantflowError, match="max_batches"):
        qf.verify({"float": graph}, [X], max_batches=most, progress=False)
