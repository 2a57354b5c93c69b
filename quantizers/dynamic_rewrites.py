"""Rewrites of the nodes that are asked for with dynamic activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, value
from quantflow.graph.rewrites import Rewrite
from quantflow.graph.rewrites.rewriting import Replacement, inserted_between
from quantizers.override import Override, override_for, remember_override
from quantizers.scheme import Scheme


def where_dynamic(apply: Rewrite, scheme: Scheme | None, overrides: Sequence[Override]) -> Rewrite:
    """Return the rewrite ``apply`` of those nodes to which ``overrides``, else ``scheme``, give dynamic activations, if their
    weights make whole groups.
    """

    def applied(module: GraphModule, node: Node) -> Replacement:
        override = override_for(node, overrides)
        asked = scheme if override is None else override.scheme
        if asked is None or not asked.activation.dynamic or not _makes_groups(node, asked.weight.group):
            return None
        before = node.prev
        replacement = apply(module, node)
        for new in inserted_between(before, node):
            remember_override(new, override)  # a predicate on the node may not match what replaces it
        return replacement

    return applied


def _makes_groups(node: Node, group: int) -> bool:
    weight = value(argument(node, "weight"))
    return not group or weight is None or weight[0].numel() % group == 0
