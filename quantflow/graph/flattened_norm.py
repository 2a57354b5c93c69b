"""Batch norm behind a flattened linear layer, as LeViT has it, brought into the form that is folded."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantflow.graph.aten import LINEARS, aten, node_argument, only_user, op, tensor_value, value
from quantflow.graph.modes import BATCH_NORM
from quantflow.graph.rewrites.rewriting import call_before, rewrite
from quantflow.graph.rewrites.shapes import reshape
from quantflow.graph.state import written_tensors

# What reads a tensor for its shape only would keep the layer where it is.
_SHAPED_ALIKE = {aten.reshape_as.default: reshape, aten.view_as.default: reshape}
_RESHAPES = frozenset({aten.flatten.using_ints, aten.reshape.default, aten.view.default})


def flatten_before_linear(module: GraphModule) -> None:
    """Move a flatten between a linear layer and a batch norm in front of the layer, in place and exact. The caller recompiles.

    The batch norm then reads the layer itself, and can be folded into it.
    """
    rewrite(module, _SHAPED_ALIKE)
    written = written_tensors(module.graph)
    for norm in list(module.graph.nodes):
        if op(norm) is not BATCH_NORM:
            continue
        flat = node_argument(norm)
        layer = flat.args[0] if op(flat) in _RESHAPES else None
        if (
            not isinstance(layer, Node)
            or op(layer) not in LINEARS
            or only_user(flat) is None
            or only_user(layer) is None
        ):
            continue
        if layer in written or flat in written or layer.kwargs or not _keeps_rows(layer, flat):
            continue
        x = node_argument(layer)
        rows = call_before(layer, aten.reshape.default, x, [-1, tensor_value(x).shape[-1]])
        moved = call_before(layer, op(layer), rows, *layer.args[1:])
        moved.meta |= {key: given for key, given in layer.meta.items() if key != "val"}
        flat.replace_all_uses_with(moved)
        module.graph.erase_node(flat)
        module.graph.erase_node(layer)


def _keeps_rows(layer: Node, flat: Node) -> bool:
    """Whether ``flat`` has the output features of ``layer`` as rows of a matrix."""
    if value(layer) is None or value(flat) is None or value(node_argument(layer)) is None:
        return False
    given, made = tensor_value(layer).shape, tensor_value(flat).shape
    static = isinstance(tensor_value(node_argument(layer)).shape[-1], int)
    return static and len(given) > 2 == len(made) and statically_known_true(made[1] == given[-1])
