"""Regions of a captured graph: the bodies of higher-order operators, as ``torch.no_grad`` leaves them."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.parameters import set_tensor, unused_name


def nodes_of(module: GraphModule) -> Iterator[Node]:
    """The nodes of ``module`` in the order of their calls, each region's where the graph names it."""
    bodies = {name: m for name, m in module.named_modules(remove_duplicate=False) if isinstance(m, GraphModule)}
    for node in module.graph.nodes:
        yield node
        if node.op == "get_attr" and (body := bodies.get(str(node.target))) is not None:
            yield from nodes_of(body)


def inline_grad_mode_regions(module: GraphModule) -> bool:
    """Write regions under ``torch.no_grad`` (or ``enable_grad``) back into the flat graph.

    Export wraps them in a higher-order operator whose body no quantizer sees. They become plain nodes between calls that
    set the grad mode, which is what they are in eager mode. Returns whether there were any.
    """
    found = False
    graph = module.graph
    hop = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not hop:
            continue
        found = True
        enabled, body_ref, *inputs = node.args
        body = module.get_submodule(str(body_ref.target))
        inline_grad_mode_regions(body)
        with graph.inserting_before(node):
            before = graph.call_function(torch.is_grad_enabled)
            graph.call_function(torch._C._set_grad_enabled, (enabled,))
            env = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), inputs, strict=True))
            for inner in body.graph.nodes:
                if inner.op in ("placeholder", "output"):
                    continue
                env[inner] = graph.node_copy(inner, lambda n, env=env: env[n])
                if inner.op in ("get_attr", "call_module"):
                    held = operator.attrgetter(str(inner.target))(body)
                    env[inner].target = _taken_over(module, f"{node.name}_{inner.name}", held)
            graph.call_function(torch._C._set_grad_enabled, (before,))
        results = next(n for n in body.graph.nodes if n.op == "output").args[0]
        results = results if isinstance(results, (tuple, list)) else (results,)
        for user in list(node.users):  # a region always returns a tuple, read by getitem
            user.replace_all_uses_with(env[results[user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body_ref.users:
            graph.erase_node(body_ref)
    graph.lint()
    return found


def _taken_over(module: GraphModule, wanted: str, held: torch.nn.Module | torch.Tensor) -> str:
    """The name, ``wanted`` or like it, under which ``module`` now has what a body ``held``."""
    name = unused_name(module, wanted)
    if isinstance(held, torch.nn.Module):
        module.add_submodule(name, held)
    else:
        set_tensor(module, name, held, parameter=isinstance(held, torch.nn.Parameter))
    return name
