"""Access to the parameters and buffers that the ``get_attr`` nodes of a graph read."""

from __future__ import annotations

from collections import Counter
from typing import TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node

from quantflow.graph.state import is_written
from quantflow.upstream.fake_tensors import FakeTensor
from quantflow.upstream.modules import own_buffers, own_modules, own_parameters

Reads = Counter[str]


def is_constant(node: object) -> TypeGuard[Node]:
    """Whether ``node`` reads a parameter, a buffer or a lifted constant that the graph does not write."""
    return isinstance(node, Node) and node.op == "get_attr" and not is_written(node)


def tensor_of(module: GraphModule, node: Node) -> torch.Tensor:
    """Return the tensor that the ``get_attr`` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), name)


def reads_of(graph: Graph) -> Reads:
    """Return the number of uses of each parameter and buffer, over all ``get_attr`` nodes that read it."""
    reads: Reads = Counter()
    for node in graph.nodes:
        if node.op == "get_attr":
            reads[str(node.target)] += len(node.users)
    return reads


def device_of(module: torch.nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer of ``module``; None if it has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def set_tensor(
    module: GraphModule, name: str, tensor: torch.Tensor, *, parameter: bool, learns: bool | None = None
) -> None:
    """Set the parameter (or buffer) called ``name`` to ``tensor``, replacing the old one.

    Args:
        module: The graph, changed in place.
        name: The name.
        tensor: The new value.
        parameter: Whether it is a parameter.
        learns: Whether a float parameter requires a gradient; by default as the old one, and True without an old one.
    """
    path, _, leaf = name.rpartition(".")
    owner = submodule_at(module, path)
    if hasattr(owner, leaf):
        old = getattr(owner, leaf)
        if learns is None and isinstance(old, torch.nn.Parameter):
            learns = old.requires_grad
        delattr(owner, leaf)
    if parameter:
        learns = tensor.is_floating_point() and learns is not False
        owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=learns))
    else:
        owner.register_buffer(leaf, tensor)


def submodule_at(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """Return the submodule of ``module`` at the dotted ``path``, created if it is missing."""
    for part in path.split(".") if path else ():
        child = own_modules(module).get(part)
        if child is None:
            child = torch.nn.Module()
            module.add_module(part, child)
        module = child
    return module


def unused_name(module: GraphModule, name: str) -> str:
    """Return ``name``, or ``name`` with the first number that makes it unused in ``module``."""
    candidate, count = name, 0
    while _exists(module, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _exists(module: torch.nn.Module, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def read_attribute(module: GraphModule, name: str, before: Node, like: Node) -> Node:
    """Insert a ``get_attr`` of ``name`` in front of ``before``, with the layer and the fake mode of ``like``."""
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    if isinstance(val := like.meta.get("val"), FakeTensor):  # stock quantizers read shapes off it
        node.meta["val"] = val.fake_mode.from_tensor(tensor_of(module, node), static_shapes=True)
    return node


def drop_unused(module: GraphModule) -> None:
    """Erase unused ``get_attr`` nodes, and the parameters and buffers that no node reads any more."""
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    # The state of a called submodule or of the body of a higher-order operator is kept.
    whole = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    whole |= {path for path, m in module.named_modules(remove_duplicate=False) if path in read and path}
    for path, owner in list(module.named_modules(remove_duplicate=False)):
        parts = path.split(".")
        if any(".".join(parts[: i + 1]) in whole for i in range(len(parts))):
            continue
        for leaf in [*own_parameters(owner), *own_buffers(owner)]:
            name = f"{path}.{leaf}" if path else leaf
            if name not in read:
                delattr(owner, leaf)
    used = {name[:end] for name in read | whole for end in [i for i, c in enumerate(name) if c == "."] + [len(name)]}
    # torch.fx's own delete_all_unused_submodules handles only the first name of a module with several names.
    for path, _ in reversed(list(module.named_modules(remove_duplicate=False))):
        if path and path not in used and not any(path.startswith(f"{kept}.") for kept in whole):
            owner, _, leaf = path.rpartition(".")
            own_modules(module.get_submodule(owner)).pop(leaf, None)  # gone already under another name of its owner
