"""Rewrites of an exported program on a graph that has the program's state as attributes.

An exported program lifts its parameters, buffers and constants to inputs of its graph. Rewrites expect graphs that read them
as attributes, as captured graphs do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from quantflow.graph.aten import may_share_memory
from quantflow.graph.parameters import submodule_at
from quantflow.graph.state import all_written_by
from quantflow.upstream.fake_tensors import detect_fake_mode
from quantflow.upstream.operators import OpOverload

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PREFIX = {InputKind.PARAMETER: "p_", InputKind.CONSTANT_TENSOR: "c_"}
_ORDER = (InputKind.TOKEN, *_STATE, InputKind.CUSTOM_OBJ, InputKind.USER_INPUT)  # the order of a program's inputs


def rewritten(program: ExportedProgram, rewrite: Callable[[GraphModule], object]) -> ExportedProgram:
    """Return a copy of ``program`` with ``rewrite`` applied to its graph. ``program`` itself does not change.

    Args:
        program: Any exported program.
        rewrite: A function that changes a graph in place. State that the program does not write is read by ``get_attr`` and may
            be replaced; state that the program writes is an input.

    Returns:
        A program with the same inputs and outputs; ``program`` itself if ``rewrite`` does not change the operators.
    """
    module = _with_attributes(program)
    before = _computing(module)
    rewrite(module)
    return program if _computing(module) == before else _lifted(program, module)


def _computing(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op != "get_attr"]


def _with_attributes(program: ExportedProgram) -> GraphModule:
    """A copy of the graph of ``program``, with ``get_attr`` nodes for the state that it only reads."""
    root, graph = nn.Module(), Graph()
    for name, body in program.graph_module.named_children():
        root.add_module(name, body)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    written = {
        *program.graph_signature.buffers_to_mutate.values(),
        *program.graph_signature.user_inputs_to_mutate.values(),
    }
    nodes: dict[Node, Node] = {}
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        tensor = _state(program, spec) if spec is not None and spec.target not in written else None
        if spec is None or tensor is None or _is_written(node):
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
            nodes[node].name = node.name  # a graph would rename an input called "input"
            continue
        path, _, leaf = str(spec.target).rpartition(".")
        if isinstance(tensor, nn.Parameter):
            submodule_at(root, path).register_parameter(leaf, tensor)
        else:
            submodule_at(root, path).register_buffer(leaf, tensor)
        nodes[node] = graph.create_node("get_attr", str(spec.target), name=node.name)
        nodes[node].meta = dict(node.meta)
    module = GraphModule(root, graph)
    module.meta = dict(program.graph_module.meta)
    return module


def _state(program: ExportedProgram, spec: InputSpec) -> torch.Tensor | None:
    """The tensor of the parameter, buffer or constant that ``spec`` declares; None for another input."""
    if spec.kind not in _STATE:
        return None
    held = program.state_dict if spec.target in program.state_dict else program.constants
    tensor = held.get(spec.target)
    return tensor if isinstance(tensor, torch.Tensor) else None


def _is_written(node: Node) -> bool:
    """Whether a reader of ``node`` or of a view of it may write to it."""
    for user in node.users:
        if user.op == "output":
            continue
        if not isinstance(user.target, OpOverload):
            return True  # a region may write to its inputs
        if node in all_written_by(user) or (may_share_memory(user) and _is_written(user)):
            return True
    return False


def _lifted(program: ExportedProgram, module: GraphModule) -> ExportedProgram:
    """A program of ``module``, which has the rewritten graph of ``program``, with its attributes lifted to inputs again."""
    known = {spec.target: spec for spec in program.graph_signature.input_specs if spec.kind in _STATE}
    by_name = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    state_dict, constants = dict(program.state_dict), dict(program.constants)
    inputs: dict[Node | str, InputSpec] = {}
    first: dict[str, Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs[node] = by_name[node.name]
        elif node.op == "get_attr" and str(node.target) in tensors and str(node.target) not in inputs:
            name = str(node.target)
            inputs[name], first[name] = _declared(name, tensors[name], known.get(name)), node
            held = state_dict if name in state_dict or inputs[name].kind is InputKind.PARAMETER else constants
            held[name] = tensors[name]
    original = [spec.target or spec.arg.name for spec in program.graph_signature.input_specs]

    def place(item: tuple[Node | str, InputSpec]) -> tuple[int, int]:
        name = item[1].target or item[1].arg.name
        return _ORDER.index(item[1].kind), original.index(name) if name in original else len(original)

    graph = Graph()
    made: dict[Node | str, Node] = {}
    specs = []
    for source, spec in sorted(inputs.items(), key=place):
        node = made[source] = graph.placeholder(spec.arg.name)
        node.name = spec.arg.name if spec.arg.name in by_name else node.name
        specs.append(replace(spec, arg=replace(spec.arg, name=node.name)))
        node.meta = dict((first[source] if isinstance(source, str) else source).meta)
        if isinstance(source, str):
            _give_value(node, tensors[source], inputs)
    for node in module.graph.nodes:
        if node in made:
            continue
        if node.op == "get_attr" and str(node.target) in made:
            made[node] = made[str(node.target)]
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    signature = ExportGraphSignature(specs, _outputs(program, graph))
    return ExportedProgram(
        module,
        graph,
        signature,
        state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        constants,
        verifiers=program.verifiers,
    )


def _declared(name: str, tensor: torch.Tensor, known: InputSpec | None) -> InputSpec:
    """The spec of the attribute ``name``: the ``known`` one if the kind did not change."""
    kind = InputKind.PARAMETER if isinstance(tensor, nn.Parameter) else InputKind.CONSTANT_TENSOR
    if known is not None and (known.kind is InputKind.PARAMETER) == (kind is InputKind.PARAMETER):
        return known
    return InputSpec(kind, TensorArgument(f"{_PREFIX[kind]}{name.replace('.', '_')}"), name)


def _give_value(node: Node, tensor: torch.Tensor, inputs: Iterable[Node | str]) -> None:
    """Set the fake tensor of new state, whose ``get_attr`` may have none."""
    val = node.meta.get("val")
    if val is not None and val.shape == tensor.shape and val.dtype == tensor.dtype:
        return
    mode = detect_fake_mode([n.meta.get("val") for n in inputs if isinstance(n, Node)])
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode is not None else tensor


def _outputs(program: ExportedProgram, graph: Graph) -> list[OutputSpec]:
    """The outputs of ``program`` by the names that they have in ``graph``."""
    given = cast(Sequence[Argument], graph.output_node().args[0])
    specs = zip(program.graph_signature.output_specs, given, strict=True)
    return [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, Node) else spec for spec, node in specs
    ]
