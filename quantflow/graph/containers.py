"""Conversion of a program's input and output containers to types that can be serialized."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch.export import ExportedProgram

from quantflow.upstream import pytree


def with_plain_containers(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with its inputs and outputs in one tuple each, if their containers can't be serialized.

    ``torch.median`` and similar operators return such containers. The tensors and their order do not change.
    """
    whole = program.module_call_graph[0]
    signature = whole.signature
    if signature is None or (_is_plain(signature.in_spec) and _is_plain(signature.out_spec)):
        return program
    taken = pytree.tree_structure(((0,) * signature.in_spec.num_leaves, {}))
    given = pytree.tree_structure((0,) * signature.out_spec.num_leaves)
    plain = replace(whole, signature=replace(signature, in_spec=taken, out_spec=given))
    return ExportedProgram(
        program.graph_module,
        copy.deepcopy(program.graph),
        program.graph_signature,
        program.state_dict,
        program.range_constraints,
        [plain, *program.module_call_graph[1:]],
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _is_plain(spec: pytree.TreeSpec) -> bool:
    try:
        pytree.treespec_dumps(spec)
    except NotImplementedError:
        return False
    return True
