"""A convolution or linear layer as what it is to a solver: rows of inputs times a matrix, in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph.aten import LINEARS, argument, aten, node_argument, op, value
from quantflow.graph.parameters import Reads, is_constant, reads_of, tensor_of
from quantflow.observers import PerGroupMinMaxObserver
from quantflow.observers.observation import affine, is_fake_quantizer, observer_of
from quantflow.qparams.qparams import PER_CHANNEL
from quantflow.simulation.fake_quantized import is_affine

_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_ROWS = 64, 256  # the fewest and the most rows that a layer draws from an example
_SOLVABLE = 4608  # features a group; solving grows with their cube


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is quantized and read here alone.

    Attributes:
        node: The call of the operator.
        weight: The call of the weight's observer.
        observer: That observer.
        groups: Groups of the convolution; 1 for a linear layer.
        kernel: Spatial size of the weight; empty for a linear layer.
        features: Features a group, those that one output is a sum of.
    """

    node: Node
    weight: Node
    observer: nn.Module
    groups: int
    kernel: tuple[int, ...]
    features: int

    @property
    def source(self) -> Node:
        """What the layer reads."""
        return node_argument(self.node)

    @property
    def bias(self) -> Node | None:
        """What reads its bias, None where it has none."""
        return argument(self.node, "bias")

    @property
    def channel_axis(self) -> int:
        """The dimension of the output (and of the input) that holds channels."""
        return -1 if self._linear else 1

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as [groups, outputs a group, features a group]."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    @property
    def channels(self) -> int:
        """The input channels that an output reads; 1 in a depthwise convolution."""
        return self.features // math.prod(self.kernel)

    @property
    def rows(self) -> int:
        """How many rows are drawn from an example: few suffice for few features."""
        fewest, most = _ROWS
        return min(max(fewest, 4 * self.features), most)

    def draw(self, output: torch.Tensor, batch: int, rows: int | None = None) -> torch.Tensor:
        """Indices of at most ``rows`` rows (by default :attr:`rows`) for each example of the output, flat over examples and
        places; the same for the same batch number.
        """
        rows = self.rows if rows is None else rows
        total = output.numel() // (output.shape[-1] if self._linear else output.shape[1])
        if total <= rows * output.shape[0]:
            return torch.arange(total, device=output.device)
        random = torch.Generator().manual_seed(batch)
        return torch.randint(total, (rows * output.shape[0],), generator=random).to(output.device)

    def outputs(self, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of the output (or its gradient) as [groups, rows, outputs a group]."""
        if self._linear:
            return y.reshape(-1, y.shape[-1])[index][None]
        places = y[0, 0].numel()
        rows = y.flatten(2)[index // places, :, index % places]
        return rows.reshape(len(index), self.groups, -1).transpose(0, 1)

    def inputs(self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The rows of inputs that made those of the output ``y``, as [groups, rows, features a group]."""
        if self._linear:
            return x.reshape(-1, x.shape[-1])[index][None]
        dims = y.ndim - 2
        stride, padding, dilation = (
            _each(argument(self.node, name), dims) for name in ("stride", "padding", "dilation")
        )
        x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
        places = y[0, 0].numel()
        example, place = index // places, index % places
        where = []
        for d in reversed(range(dims)):
            start = (place % y.shape[2 + d]) * stride[d]
            place = place // y.shape[2 + d]
            offsets = torch.arange(self.kernel[d], device=index.device) * dilation[d]
            shape = [len(index), *(len(offsets) if e == d else 1 for e in range(dims))]
            where.append((start[:, None] + offsets).reshape(shape))
        at: tuple[torch.Tensor | slice, ...] = (example.reshape(-1, *[1] * dims), slice(None), *reversed(where))
        patches = x[at]  # [rows, *kernel, channels]
        patches = patches.flatten(1, dims).transpose(1, 2)
        return patches.reshape(len(index), self.groups, -1).transpose(0, 1)

    @property
    def _linear(self) -> bool:
        return op(self.node) in LINEARS


def quantized_layers(graph: GraphModule, *, solvable: bool = True) -> dict[Node, Layer]:
    """The layers of a prepared graph by node: those whose weight can be solved for, or, without ``solvable``, all."""
    reads = reads_of(graph.graph)
    reads.update(str(n.target) for n in graph.graph.nodes if n.op == "call_module")
    found = (_layer(node, graph, reads) for node in graph.graph.nodes)
    return {layer.node: layer for layer in found if layer is not None and (not solvable or _is_solvable(layer))}


def _is_solvable(layer: Layer) -> bool:
    """Whether a solver can hold the layer's features, and knows its grid: one step an output, or one for all."""
    return layer.features <= _SOLVABLE and not isinstance(layer.observer, PerGroupMinMaxObserver)


def _layer(node: Node, graph: GraphModule, reads: Reads) -> Layer | None:
    if op(node) not in LINEARS and op(node) not in _CONVOLUTIONS:
        return None
    weight, bias, output = argument(node, "weight"), argument(node, "bias"), value(node)
    if not isinstance(weight, Node) or not weight.args or not is_constant(weight.args[0]) or output is None:
        return None
    observer = observer_of(weight, graph)
    if observer is None or is_fake_quantizer(observer) or not is_affine(observer) or len(weight.users) > 1:
        return None
    if affine(observer).qscheme in PER_CHANNEL and int(affine(observer).ch_axis) != 0:
        return None
    if bias is not None and not is_constant(bias):
        return None
    if any(
        reads[str(n.target)] > 1 for n in (weight, weight.args[0], bias) if n is not None
    ):  # others would change too
        return None
    if op(node) in _CONVOLUTIONS and output.ndim != _CONVOLUTIONS[op(node)] + 2:  # an unbatched call
        return None
    tensor = tensor_of(graph, node_argument(weight))
    groups = 1 if op(node) in LINEARS else int(argument(node, "groups"))
    if not tensor.is_floating_point():
        return None
    return Layer(node, weight, observer, groups, tuple(tensor.shape[2:]), tensor[0].numel())


def _each(given: int | Sequence[int], dims: int) -> list[int]:
    given = [given] if isinstance(given, int) else list(given)
    return [int(g) for g in (given * dims if len(given) == 1 else given)]
