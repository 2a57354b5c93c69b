import torch

from quantflow.upstream.edge_operators import EdgeOpOverload, ops


def test_an_edge_operator_wraps_an_aten_operator():
    softmax = ops.edge.aten._softmax.default
    assert isinstance(softmax, EdgeOpOverload)
    assert softmax._op is torch.ops.aten._softmax.default


def test_an_edge_operator_is_one_object():
    assert ops.edge.aten.add.Tensor is ops.edge.aten.add.Tensor
    assert ops.edge.aten.add.Tensor in {ops.edge.aten.add.Tensor}


def test_an_edge_operator_runs():
    assert ops.edge.aten.add.Tensor(torch.ones(1), torch.ones(1)) == 2
