import torch
from torch import nn
from torch.export import ExportedProgram, default_decompositions

from quantflow.upstream.lowering.decomposition import decompose_once
from quantflow.upstream.replaced import exclusively


def test_a_decomposed_program_is_returned_unchanged():
    program = torch.export.export(nn.Hardswish(), (torch.zeros(2),))
    table = default_decompositions()
    stock = ExportedProgram.run_decompositions
    with exclusively(), decompose_once():
        once = program.run_decompositions(table)
        assert once is not program
        assert once.run_decompositions(table) is once
    assert ExportedProgram.run_decompositions is stock
    assert [str(n.target) for n in once.graph.nodes] == [
        str(n.target) for n in program.run_decompositions().graph.nodes
    ]


def test_what_a_further_table_names_is_decomposed():
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    with exclusively(), decompose_once():
        once = program.run_decompositions({})
        table = {torch.ops.aten.relu.default: lambda x: x.clamp(min=0)}
        twice = once.run_decompositions(table)
    assert twice is not once
    assert torch.ops.aten.relu.default not in [n.target for n in twice.graph.nodes]
