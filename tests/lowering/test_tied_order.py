"""Equal values come in any order, and no other indices pass."""

import pytest
import torch
import torch.utils._pytree as pytree
from edges import Function, edge_of
from torch.nn import functional as F

from quantflow.lowering.runtime_check import _difference, _Reference
from quantflow.signature.signature import Signature

X = torch.randn(2, 4, 8, 8)
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
