"""A pass for softmax, whose result XNNPACK's channels-last memory layout would change."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from quantflow.upstream.edge_operators import ops
from quantflow.upstream.fake_tensors import FakeTensor

_edge = ops.edge.aten
# Operators that XNNPACK computes in channels-last layout, and operators that restore the contiguous layout.
_CHANNELS_LAST = frozenset(
    {
        *(_edge.convolution.default, _edge.conv2d.default, _edge.avg_pool2d.default, _edge.max_pool2d.default),
        *(
            _edge.max_pool2d_with_indices.default,
            _edge._adaptive_avg_pool2d.default,
            _edge.mean.dim,
            _edge.amax.default,
        ),
        *(_edge.upsample_bilinear2d.vec, _edge.prelu.default, _edge._native_batch_norm_legit_no_training.default),
    }
)
_ORDERED = frozenset({_edge.view_copy.default, _edge.linear.default, _edge.bmm.default, _edge.mm.default})
_IMAGES = 4  # dimensions


def softmax_over_rows(module: GraphModule) -> PassResult:
    """Compute the softmax over the rows of an image on a view of three dimensions.

    The delegate computes the softmax over the last dimension in memory. After a convolution this is the channel dimension.
    """
    changed = False
    for node in list(module.graph.nodes):
        if node.target is not _edge._softmax.default or not _behind_channels_last(node):
            continue
        val = node.meta["val"]
        static = all(isinstance(size, int) for size in val.shape[1:])
        if val.ndim != _IMAGES or not static or node.args[1] not in (-1, val.ndim - 1):
            continue
        whole = [size if isinstance(size, int) else -1 for size in val.shape]
        with module.graph.inserting_before(node):
            rows = module.graph.call_function(_edge.view_copy.default, (node.args[0], _rows(whole)))
            rows.meta = {**node.meta, "val": _viewed(val, _rows(whole))}
        with module.graph.inserting_after(node):
            back = module.graph.call_function(_edge.view_copy.default, (node, whole))
            back.meta = dict(node.meta)
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        node.args, node.meta["val"] = (rows, -1, *node.args[2:]), rows.meta["val"]
        changed = True
    if changed:
        module.recompile()
    return PassResult(module, changed)


def _behind_channels_last(node: Node) -> bool:
    """Whether an input of ``node`` may have the channels-last layout."""
    ahead, seen = list(node.all_input_nodes), set[Node]()
    while ahead:
        given = ahead.pop()
        val = given.meta.get("val")
        if given in seen or given.target in _ORDERED or not isinstance(val, torch.Tensor):
            continue
        seen.add(given)
        if given.target in _CHANNELS_LAST and val.ndim == _IMAGES:
            return True
        ahead += given.all_input_nodes
    return False


def _rows(shape: list[int]) -> list[int]:
    """``shape`` with its second and third dimension merged."""
    return [shape[0], shape[1] * shape[2], shape[3]]


def _viewed(val: FakeTensor, shape: list[int]) -> torch.Tensor:
    with val.fake_mode:
        return val.new_empty((val.shape[0], *shape[1:]))
