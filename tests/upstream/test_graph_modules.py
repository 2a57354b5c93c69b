import copy

import torch
from torch import fx, nn

from quantflow.upstream.graph_modules import GENERATED, codegen_of, pytree_info_of


def captured():
    return torch.export.export(nn.ReLU(), (torch.zeros(1),)).module()


def test_an_exported_graph_has_the_structure_of_its_inputs_and_outputs():
    info = pytree_info_of(captured().graph)
    args, kwargs = info.in_spec.children()
    assert (args.num_leaves, kwargs.context) == (1, [])
    assert info.out_spec.num_leaves == 1


def test_a_traced_graph_is_flat():
    assert pytree_info_of(fx.symbolic_trace(nn.ReLU()).graph) is None


def test_a_code_generator_is_made_from_its_structure():
    graph = captured().graph
    codegen = type(codegen_of(graph))(pytree_info_of(graph))
    graph.set_codegen(codegen)
    assert codegen_of(graph) is codegen
    assert type(codegen_of(fx.Graph()))() is not None


def test_the_generated_attributes_are_computed_from_the_graph():
    module = fx.symbolic_trace(nn.ReLU())
    assert set(vars(module)) >= GENERATED - {"_tracer_cls"}
    root = nn.Module()
    vars(root).update({k: v for k, v in vars(module).items() if k not in GENERATED})
    again = fx.GraphModule(root, copy.deepcopy(module.graph))
    assert again.code == module.code
    assert again(torch.ones(1)) == 1
