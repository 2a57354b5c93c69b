"""Conversion of the parameters that a program writes to buffers, the only state that lowering keeps."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from torch.fx import Node

from quantflow.graph.state import is_written


def written_parameters_as_buffers(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with each parameter that it writes in place declared as a buffer, and do not change ``program``."""
    specs = program.graph_signature.input_specs
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    written = [s for s in specs if s.kind is InputKind.PARAMETER and is_written(inputs[s.arg.name])]
    if not written:
        return program
    graph, state_dict = copy.deepcopy(program.graph), dict(program.state_dict)
    nodes: dict[str, Node] = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for spec in written:
        state_dict[str(spec.target)] = state_dict[str(spec.target)].detach()
    declared = [s if s not in written else replace(s, kind=InputKind.BUFFER, persistent=True) for s in specs]
    ordered: list[InputSpec] = sorted(declared, key=lambda s: s.kind is not InputKind.PARAMETER)
    for before, spec in itertools.pairwise(ordered):
        nodes[before.arg.name].append(nodes[spec.arg.name])
    return ExportedProgram(
        program.graph_module,
        graph,
        ExportGraphSignature(ordered, list(program.graph_signature.output_specs)),
        state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )
