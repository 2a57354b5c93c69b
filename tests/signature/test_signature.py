"""A signature survives JSON, and refuses what does not fit it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Structured

import quantflow as qf
from quantflow import pte
from quantflow.signature.signature import DynamicDim, Input, Signature

DIMS = st.one_of(
    st.integers(0, 64), st.builds(DynamicDim, st.text(min_size=1), st.integers(0, 4), st.none() | st.integers(5, 99))
)
INPUTS = st.builds(Input, st.text(min_size=1), st.sampled_from(["float32", "int64"]), st.lists(DIMS).map(tuple))


@given(st.lists(INPUTS).map(tuple))
def test_json_round_trip(inputs):
    signature = Signature(inputs)
    assert Signature.from_json(signature.to_json()) == signature


def exported():
    batch = torch.export.Dim("batch", min=1, max=6)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    return qf.export(Structured(), (torch.randn(2, 8),), {"y": torch.randn(2, 4)}, dynamic_shapes=shapes)


def test_structure_survives_json():
    signature = exported().signature
    again = Signature.from_json(signature.to_json())
    assert again == signature
    assert again.unflatten([1, 2, 3]) == {"sum": 1, "parts": (2, 3)}


@pytest.mark.parametrize(
    ("args", "kwargs", "node"),
    [
        ((), {}, None),
        ((torch.randn(2, 8),), {"z": torch.randn(2, 4)}, None),
        ((torch.randn(2, 8), torch.randn(2, 4)), {}, None),
        ((torch.randn(2, 9),), {"y": torch.randn(2, 4)}, "x"),
        ((torch.randn(2, 8).double(),), {"y": torch.randn(2, 4)}, "x"),
        ((torch.randn(2, 8),), {"y": torch.randn(3, 4)}, "y"),
        ((torch.randn(7, 8),), {"y": torch.randn(7, 4)}, "x"),
        (("x",), {"y": torch.randn(3, 4)}, "x"),
    ],
)
def test_what_does_not_fit_is_named(args, kwargs, node):
    with pytest.raises(qf.QuantflowError) as caught:
        exported().signature.flatten(args, kwargs, stage="runtime")
    assert caught.value.stage == "runtime"
    assert caught.value.node == node
    assert caught.value.remedy


class Scaled(torch.nn.Module):
    def forward(self, x, times):
        return x * times


@pytest.mark.parametrize("given", [torch.ones(4), torch.tensor(3), np.ones(4), 4, "3", None])
def test_what_is_given_for_a_constant_is_that_constant(given):
    signature = qf.export(Scaled(), (torch.randn(4), 3)).signature
    assert signature.flatten((torch.randn(4), 3), {}, stage="runtime")[1] == 3
    with pytest.raises(qf.QuantflowError, match=r"times: .* given where the program was captured with the constant 3"):
        signature.flatten((torch.randn(4), given), {}, stage="runtime")


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", '{"inputs": [{"name": 1}]}', '{"inputs": 3, "in_spec": null, "out_spec": null}']
)
def test_a_signature_that_can_not_be_read_is_told(text):
    from executorch.exir import to_edge

    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    program = to_edge(exported, constant_methods={pte.SIGNATURE_METHOD: text}).to_executorch()
    with pytest.raises(qf.QuantflowError, match="its signature can't be read"):
        qf.Program.from_buffer(program.buffer)


@pytest.mark.parametrize("spec", ["[" * 100_000, "3", '[1, {"type": null, "context": 5, "children_spec": [null]}]'])
def test_a_structure_that_can_not_be_read_is_left_out(spec):
    text = json.dumps({"inputs": [], "in_spec": spec, "out_spec": spec})
    assert Signature.from_json(text).out_spec is None
