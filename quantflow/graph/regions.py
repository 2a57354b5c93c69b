"""Regions of a captured graph: the bodies of higher-order operators, such as those of ``torch.no_grad`` and autocast."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.parameters import set_tensor, unused_name
from quantflow.upstream.autocast import enter_autocast, exit_autocast
from quantflow.upstream.grad_mode import set_grad_enabled
from quantflow.upstream.operators import HigherOrderOperator

GRAD_MODE: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST: Any = torch.ops.higher_order.wrap_with_autocast


def nodes_of(module: GraphModule) -> Iterator[Node]:
    """Yield the nodes of ``module`` and of its regions. The nodes of a region come at the place of its ``get_attr``."""
    bodies = {name: m for name, m in module.named_modules(remove_duplicate=False) if isinstance(m, GraphModule)}
    for node in module.graph.nodes:
        yield node
        if node.op == "get_attr" and (body := bodies.get(str(node.target))) is not None:
            yield from nodes_of(body)


def bodies_of(node: Node, module: GraphModule) -> dict[str, GraphModule]:
    """Return the bodies that ``node`` of ``module`` calls, by name; none if it calls no region."""
    if not isinstance(node.target, HigherOrderOperator):
        return {}
    names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    held = {name: operator.attrgetter(name)(module) for name in names}
    return {name: body for name, body in held.items() if isinstance(body, GraphModule)}


def switches(node: Node) -> bool:
    """Whether the region that ``node`` calls changes its mode with the graph. A conditional branch does not."""
    return node.target in (GRAD_MODE, AUTOCAST)


def is_inlined(node: Node) -> bool:
    """Whether the region that ``node`` calls is written back into the graph."""
    return node.target is GRAD_MODE or (node.target is AUTOCAST and not node.args[2])


def nodes_beyond(module: GraphModule, passed: Callable[[Node], bool], within: bool = True) -> Iterator[Node]:
    """Yield the nodes of all regions of ``module``, except those reached only by calls with ``passed(call)`` true."""
    for node in module.graph.nodes:
        if not within:
            yield node
        for body in bodies_of(node, module).values():
            yield from nodes_beyond(body, passed, within and passed(node))


def inline_regions(module: GraphModule) -> frozenset[str]:
    """Inline the regions of ``torch.no_grad``, ``enable_grad`` and a disabled autocast into the graph.

    Export wraps these regions in higher-order operators, and quantizers do not see their bodies. Here they become plain nodes
    between calls that set the mode, as in eager mode. A region of an enabled autocast stays a region.

    Returns:
        The settings that the graph now changes: ``"grad"``, or the device type of an autocast.
    """
    graph, found = module.graph, set[str]()
    for node in list(graph.nodes):
        for body in bodies_of(node, module).values():
            inner = inline_regions(body)
            body.recompile()
            if is_inlined(node):
                found |= inner
                found.add("grad" if node.target is GRAD_MODE else str(node.args[0]))
                _inline(node, body, module)
    graph.lint()
    return frozenset(found)


def inline_for_inference(module: GraphModule) -> None:
    """Inline the regions of ``torch.no_grad``, ``enable_grad`` and a disabled autocast that no other region encloses, in place.

    No call sets the mode: gradients are not computed, and autocast is off already.
    """
    while inlined := [node for node in module.graph.nodes if is_inlined(node) and bodies_of(node, module)]:
        for node in inlined:
            for body in bodies_of(node, module).values():
                _inline(node, body, module, sets=False)


def inputs_of(node: Node) -> tuple:
    """Return the inputs of the body that ``node``, a call of a grad mode or autocast region, passes to it."""
    return node.args[2:] if node.target is GRAD_MODE else node.args[5:]


def _inline(node: Node, body: GraphModule, module: GraphModule, *, sets: bool = True) -> None:
    """Replace ``node`` of ``module`` by the nodes of ``body``, which it calls, between calls that set its mode if ``sets``."""
    graph = module.graph
    env = dict(zip(body.graph.find_nodes(op="placeholder"), inputs_of(node), strict=True))
    with graph.inserting_before(node):
        ended = _begun(node) if sets else None
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            env[inner] = graph.node_copy(inner, env.__getitem__)
            if inner.op in ("get_attr", "call_module"):
                held = operator.attrgetter(str(inner.target))(body)
                env[inner].target = _taken_over(module, f"{node.name}_{inner.name}", held)
        if ended is not None:
            graph.call_function(*ended)
    results = body.graph.output_node().args[0]
    results = results if isinstance(results, (tuple, list)) else (results,)
    for user in list(node.users):  # a region always returns a tuple, read by getitem
        user.replace_all_uses_with(env[results[cast(int, user.args[1])]])
        graph.erase_node(user)
    body_refs = node.all_input_nodes
    graph.erase_node(node)
    for ref in body_refs:
        if ref.op == "get_attr" and not ref.users and operator.attrgetter(str(ref.target))(module) is body:
            graph.erase_node(ref)


def _begun(node: Node) -> tuple[Callable, tuple[Node]]:
    """Insert the call that sets the mode of the region ``node``; return the call that ends it."""
    graph = node.graph
    if node.target is not GRAD_MODE:
        return exit_autocast, (graph.call_function(enter_autocast, node.args[:4]),)
    before = graph.call_function(torch.is_grad_enabled)
    graph.call_function(set_grad_enabled, (node.args[0],))
    return set_grad_enabled, (before,)


@contextlib.contextmanager
def brought_back(settings: Iterable[str]) -> Iterator[None]:
    """Restore the settings that a graph changes, also if the graph raises.

    Args:
        settings: As :func:`inline_regions` returns them.
    """
    devices = [name for name in settings if name != "grad"]
    was = [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
    depth, caches = _autocast_depth() if devices else 0, torch.is_autocast_cache_enabled()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    except BaseException:
        for name, (enabled, dtype) in zip(devices, was, strict=True):
            torch.set_autocast_enabled(name, enabled)
            torch.set_autocast_dtype(name, dtype)
        if devices:
            torch.set_autocast_cache_enabled(caches)
            while _autocast_depth() > depth:
                torch.autocast_decrement_nesting()
        raise


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _taken_over(module: GraphModule, wanted: str, held: torch.nn.Module | torch.Tensor) -> str:
    """Add ``held``, an attribute of a body, to ``module``, and return its name: ``wanted``, or similar if that is taken."""
    name = unused_name(module, wanted)
    if isinstance(held, torch.nn.Module):
        module.add_submodule(name, held)
    else:
        set_tensor(module, name, held, parameter=isinstance(held, torch.nn.Parameter))
    return name
