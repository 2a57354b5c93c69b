"""A signature survives JSON, and refuses what does not fit it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Structured

import quantflow as qf
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
