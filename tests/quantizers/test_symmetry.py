"""Operands of products are centered on zero where the backend asks so, with all that shares their grid."""

import torch
from attention import Layers
from torch.nn import functional as F

import quantflow as qf
from quantizers import XNNPACKQuantizer


def observed(function, count):
    """Which tensor each observer behind the layers looks at, and whether its grid is centred on zero."""
    graph = qf.export(Layers(function, count), (torch.randn(4, 6, 8),)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    calls = [
        n for n in prepared.graph.nodes if n.op == "call_module" and n.args[0].op in ("call_function", "call_module")
    ]
    return [(n.args[0].name, prepared.get_submodule(n.target).symmetric) for n in calls if "weight" not in n.name]


def test_a_second_operand_lies_with_its_layer_on_one_centred_grid():
    found = observed(lambda a, b: torch.bmm(a, b.transpose(1, 2)), 2)
    assert found == [("linear", False), ("linear_1", True), ("transpose", True), ("bmm", False)]


def test_parts_of_one_layer_share_its_grid_with_the_second_operand():
    found = observed(lambda a: torch.bmm(a[..., :4], a[..., 4:].transpose(1, 2)), 1)
    assert [symmetric for _, symmetric in found] == [True] * (len(found) - 1) + [False]


def test_what_has_one_sign_is_centred_only_where_nothing_else_reads_it():
    def alone(a, b):
        return torch.bmm(a, F.relu(b).transpose(1, 2))

    def read_by_others(a, b):
        b = F.relu(b)
        return torch.bmm(a, b.transpose(1, 2)), b * 2

    assert dict(observed(alone, 2))["relu"]
    found = observed(read_by_others, 2)
    assert not dict(found)["relu"]  # the sum keeps all its levels
    assert [
        symmetric for name, symmetric in found if name not in ("linear", "relu", "transpose", "bmm", "mul_tensor")
    ] == [
        True  # and the product reads it requantized
    ]


def test_one_tensor_in_both_operands():
    found = observed(lambda a: torch.bmm(a.transpose(1, 2), a), 1)
    assert found[:2] == [("linear", True), ("transpose", True)]
