"""Groups of annotated tensors that share an observer.

This is torchao's annotation protocol: an edge ``(producer, consumer)`` or an output ``node`` may be annotated to share with
another one. The edges out of one tensor share with each other and with its output if their specs ask for the same
quantization parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Graph, Node
from torchao.quantization.pt2e.quantizer import EdgeOrNode, QuantizationAnnotation, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationSpecBase

from quantflow.errors import QuantflowError
from quantflow.graph.aten import label

# Two specs that agree in all of these attributes ask for the same quantization parameters.
_GRID = ("dtype", "is_dynamic", "quant_min", "quant_max", "qscheme", "ch_axis", "scale", "zero_point")


def annotation_of(node: Node) -> QuantizationAnnotation | None:
    """The quantization annotation of ``node``; None if it has none."""
    return node.meta.get(Q_ANNOTATION_KEY)


def annotated_specs(graph: Graph) -> dict[EdgeOrNode, QuantizationSpecBase]:
    """The spec of every annotated edge and output, in graph order."""
    specs: dict[EdgeOrNode, QuantizationSpecBase] = {}
    for node in graph.nodes:
        annotation = annotation_of(node)
        if annotation is None:
            continue
        specs.update({(producer, node): s for producer, s in annotation.input_qspec_map.items() if s is not None})
        if annotation.output_qspec is not None:
            specs[node] = annotation.output_qspec
    return specs


@dataclass
class Group:
    """Edges and outputs that share one observer, and the spec of that observer."""

    spec: QuantizationSpecBase
    members: list[EdgeOrNode] = field(default_factory=list)


def sharing_groups(graph: Graph) -> list[Group]:
    """The groups of annotated edges and outputs that share an observer, in graph order."""
    specs = annotated_specs(graph)
    roots: dict[EdgeOrNode, QuantizationSpecBase] = {key: _root_spec(key, specs) for key in specs}
    parent: dict[EdgeOrNode, EdgeOrNode] = {key: key for key in specs}

    def find(key: EdgeOrNode) -> EdgeOrNode:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def union(a: EdgeOrNode, b: EdgeOrNode) -> None:
        parent[find(a)] = find(b)

    for key, spec in specs.items():
        if isinstance(spec, SharedQuantizationSpec):
            union(key, spec.edge_or_node)
        annotation = annotation_of(key[1]) if isinstance(key, tuple) else None
        if isinstance(key, tuple) and annotation is not None and annotation.allow_implicit_sharing:
            for same_tensor in _same_tensor(key[0]):
                if same_tensor in specs and _same_grid(roots[key], roots[same_tensor]):
                    union(key, same_tensor)

    groups: dict[EdgeOrNode, Group] = {}
    for key in specs:
        groups.setdefault(find(key), Group(roots[key])).members.append(key)
    return list(groups.values())


def _same_tensor(producer: Node) -> Iterable[EdgeOrNode]:
    yield producer
    for user in producer.users:
        yield (producer, user)


def _same_grid(a: QuantizationSpecBase, b: QuantizationSpecBase) -> bool:
    return all(getattr(a, name, None) == getattr(b, name, None) for name in _GRID)


def _root_spec(key: EdgeOrNode, specs: dict[EdgeOrNode, QuantizationSpecBase]) -> QuantizationSpecBase:
    """The spec at the end of a chain of sharing."""
    spec, seen = specs[key], {key}
    while isinstance(spec, SharedQuantizationSpec):
        target = spec.edge_or_node
        node = key[1] if isinstance(key, tuple) else key
        if target not in specs:
            reason = f"shares quantization with {target}, which has no annotation"
            raise QuantflowError("prepare", reason, node=label(node), remedy="annotate that edge or node too")
        if target in seen:
            reason = "shares quantization in a cycle"
            raise QuantflowError("prepare", reason, node=label(node), remedy="give one member a spec of its own")
        seen.add(target)
        spec = specs[target]
    return spec
