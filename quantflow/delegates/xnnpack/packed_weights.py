"""A pass for 4-bit weights that XNNPACK's kernels take as 8-bit integers only."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from quantflow.upstream.edge_operators import ops

_edge = ops.edge.aten
_DEQUANTIZE = ops.edge.quantized_decomposed.dequantize_per_channel.default
_LIMITS = slice(4, 7)  # the arguments quant_min, quant_max and dtype
_PACKED = (-8, 7, torch.int8)  # by which the delegate tells weights that it packs as two integers a byte
_BYTES = (-128, 127, torch.int8)
_CONVOLUTIONS = frozenset({_edge.convolution.default, _edge.conv1d.default, _edge.conv2d.default})
_TRANSPOSES = frozenset({_edge.permute_copy.default, _edge.t_copy.default})


def four_bits_as_eight(module: GraphModule) -> PassResult:
    """Declare 4-bit weights that no kernel takes packed as 8-bit integers; their values stay.

    XNNPACK packs 4-bit weights of linear layers, two integers a byte. Of a convolution, the delegate's compiler fails to pack
    them. Of a linear layer with an odd number of inputs, the result of the packed is wrong: with dynamic activations on all
    machines seen, with static ones on those whose kernels use AVX-512 VNNI.
    """
    changed = False
    for node in module.graph.nodes:
        if node.target is not _DEQUANTIZE or tuple(node.args[_LIMITS]) != _PACKED:
            continue
        odd = node.meta["val"].shape[-1] % 2 == 1
        if odd or any(layer.target in _CONVOLUTIONS for layer in _layers(node)):
            node.args = (*node.args[: _LIMITS.start], *_BYTES, *node.args[_LIMITS.stop :])
            changed = True
    if changed:
        module.recompile()
    return PassResult(module, changed)


def _layers(weight: Node) -> list[Node]:
    """The readers of ``weight``, behind a transpose."""
    return [layer for user in weight.users for layer in (_layers(user) if user.target in _TRANSPOSES else [user])]
