import pytest
import torch

from quantflow.upstream.edge_operators import ops
from quantflow.upstream.fake_tensors import FakeTensorMode
from quantflow.upstream.lowering.operator_results import OperatorResults

aten, edge = torch.ops.aten, ops.edge.aten


def fake(*shape):
    with FakeTensorMode():
        return torch.empty(shape)


def computed_twice(target, *args):
    """Whether a second call with the same arguments is computed again."""
    results, computed = OperatorResults(), []
    for _ in range(2):
        results.run(target, args, {}, lambda: computed.append(fake(2)) or computed[-1])
    return len(computed) == 2


def test_an_edge_operator_wraps_an_aten_operator():
    assert edge.add.Tensor._op is aten.add.Tensor
    assert not isinstance(aten.add.Tensor._op, torch._ops.OpOverload)


def test_the_same_inputs_are_computed_once():
    x = fake(2)
    assert not computed_twice(edge.add.Tensor, x, x)
    assert not computed_twice(edge.view_copy.default, x, [1, 2])


def test_other_inputs_are_computed():
    x, y = fake(2), fake(2)
    results = OperatorResults()
    made = [fake(2) for _ in range(4)]
    calls = [((x, y), {}), ((x, x), {}), ((x, y), {"alpha": 2}), ((x, 1), {})]
    for (args, kwargs), value in zip(calls, made, strict=True):
        assert results.run(edge.add.Tensor, args, kwargs, lambda value=value: value) is value
    for (args, kwargs), value in zip(calls, made, strict=True):
        assert results.run(edge.add.Tensor, args, kwargs, lambda: None) is value


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (edge.relu_.default, (fake(2),)),
        (edge.native_dropout.default, (fake(2), 0.5, True)),
        (edge.nonzero.default, (fake(2),)),
        (edge.neg.default, (torch.zeros(2),)),
        (aten.neg.default, (fake(2),)),
    ],
    ids=["write", "random", "data-dependent", "real tensor", "aten"],
)
def test_what_is_not_kept(target, args):
    assert computed_twice(target, *args)
