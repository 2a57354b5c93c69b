"""Detection and folding of batch norm after a convolution or linear layer.

Folding is exact only if the batch norm is the only user of the layer's output. A convolution with two users, or with an
addition before the batch norm, is left unchanged. A convolution called twice, each time before a batch norm, is folded at
each call with separate weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import TRANSPOSED_CONVOLUTIONS, WEIGHTED, argument, aten, op, set_argument, value
from quantflow.graph.constants import follows_from_constants
from quantflow.graph.modes import BATCH_NORM, FROZEN, SWITCHED, is_inference_constant
from quantflow.graph.parameters import (
    Reads,
    drop_unused,
    is_constant,
    read_attribute,
    reads_of,
    set_tensor,
    tensor_of,
    unused_name,
)

OUTPUT_MOMENTS = (
    "quantflow_output_moments"  # node.meta: mean and deviation of each channel of a layer's output, float64
)
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class NormedLayer:
    """A layer with constant weights, and the batch norm that is the only user of its output."""

    layer: Node
    norm: Node
    weight: Node  # the layer's weight, also if an observer stands between them; a ``get_attr`` if not computed

    @property
    def transposed(self) -> bool:
        """Whether the layer is a transposed convolution, with output channels in dimension 1 of the weight."""
        return op(self.layer) in TRANSPOSED_CONVOLUTIONS

    @property
    def channel_axis(self) -> int:
        """The dimension of the weight that holds output channels."""
        return 1 if self.transposed else 0

    def scale_and_shift(self, module: GraphModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``scale`` and ``shift`` of the norm in inference mode, ``y·scale + shift``: float64, one per channel."""
        gamma, beta, mean, var = (
            tensor_of(module, node).detach().double() if is_constant(node := argument(self.norm, name)) else None
            for name in _STATISTICS
        )
        mean, var = cast(torch.Tensor, mean), cast(torch.Tensor, var)
        scale = torch.rsqrt(var + argument(self.norm, "eps"))
        scale = scale if gamma is None else scale * gamma
        shift = -mean * scale
        return scale, shift if beta is None else shift + beta

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the norm's parameters and statistics, and its ``eps``. They identify the norm."""
        tensors = (getattr(argument(self.norm, name), "target", None) for name in _STATISTICS)
        return (*map(str, tensors), str(argument(self.norm, "eps")))

    def output_moments(self, module: GraphModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of each output channel of the norm over its training data, float64."""
        gamma, beta, _, var = (
            None if (read := argument(self.norm, name)) is None else tensor_of(module, read).detach().double()
            for name in _STATISTICS
        )
        std = torch.ones_like(cast(torch.Tensor, var)) if gamma is None else gamma.abs()
        return torch.zeros_like(std) if beta is None else beta.clone(), std

    def folded_bias(self, module: GraphModule) -> torch.Tensor:
        """Return the bias of the layer after folding the norm, float64, one per channel."""
        scale, shift = self.scale_and_shift(module)
        bias = argument(self.layer, "bias")
        return shift if bias is None else tensor_of(module, bias).detach().double() * scale + shift

    def per_weight(self, scale: torch.Tensor, module: GraphModule) -> torch.Tensor:
        """Return ``scale`` (one per output channel) in a shape that multiplies the layer's weight."""
        weight = tensor_of(module, self.weight)
        if not self.transposed:
            return scale.reshape(-1, *[1] * (weight.ndim - 1))
        # [in, out / groups, ...]: group g of the inputs computes the channels from g·out/groups.
        groups = argument(self.layer, "groups")
        rows = scale.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
        return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))


def normed_layers(graph: torch.fx.Graph) -> list[NormedLayer]:
    """Return every layer of ``graph`` that the batch norm after it can be folded into or fused with."""
    return [found for node in graph.nodes if (found := normed_layer(node)) is not None]


def normed_layer(norm: Node) -> NormedLayer | None:
    """Return ``norm`` with the layer before it, or None if it is no batch norm or can't be folded."""
    if not _is_affine(norm):
        return None
    layer = norm.args[0]
    if not isinstance(layer, Node) or len(layer.users) != 1:
        return None
    if op(layer) not in WEIGHTED:
        return None
    weight, bias = argument(layer, "weight"), argument(layer, "bias")
    while isinstance(weight, Node) and weight.op == "call_module":
        weight = weight.args[0]
    if not follows_from_constants(weight) or not (bias is None or follows_from_constants(bias)):
        return None
    if (val := value(layer)) is None:
        return None
    # Batch norm has channels in dimension 1, linear in the last dimension, a convolution without a batch in the first.
    return NormedLayer(layer, norm, weight) if (size := value(weight)) is None or val.ndim == size.ndim else None


def _is_affine(node: Node) -> bool:
    """Whether ``node`` is a batch norm that is a constant scale and shift in inference."""
    if op(node) is not BATCH_NORM or not is_inference_constant(node):
        return False
    return all((read := argument(node, name)) is None or is_constant(read) for name in _STATISTICS)


def fold_batch_norm(module: GraphModule) -> list[str]:
    """Fold each foldable batch norm of ``module`` into the weight and bias of the layer before it, in place.

    Returns:
        The names of the layer nodes whose batch norm was folded. Unused parameters are dropped. The caller recompiles.
    """
    folded = []
    reads = reads_of(module.graph)
    made: dict[tuple, tuple[str, str]] = {}  # two calls of one layer with one norm share the folded weights
    for pair in normed_layers(module.graph):
        if not all(is_constant(read) for read in (pair.weight, argument(pair.layer, "bias")) if read is not None):
            continue  # it is computed in each call
        bias = getattr(argument(pair.layer, "bias"), "target", None)
        key = (str(pair.layer.target), str(pair.layer.args[3:]), str(pair.weight.target), str(bias), *pair.statistics)
        if key not in made:
            made[key] = _fold_weight(module, pair, reads), _fold_bias(module, pair, reads)
        weight, bias = made[key]
        set_argument(pair.layer, "weight", read_attribute(module, weight, pair.layer, pair.weight))
        _replace_norm(module, pair, bias)
        folded.append(pair.layer.name)
    drop_unused(module)
    return folded + fold_batch_norm(module) if folded else []  # another norm may follow


_CONVOLVES = {3: aten.conv1d.default, 4: aten.conv2d.default}  # by the rank of the norm's input


def norm_as_convolution(module: GraphModule) -> None:
    """Replace each 1-d or 2-d batch norm that can't be folded by a depthwise convolution with kernel size 1, which backends
    run in integers.

    In place, for inference. The caller recompiles.
    """
    for norm in list(module.graph.nodes):
        if not _is_affine(norm) or (val := value(norm)) is None or normed_layer(norm) is not None:
            continue
        if (convolve := _CONVOLVES.get(val.ndim)) is None:
            continue
        places = val.ndim - 2
        scale, shift = NormedLayer(norm, norm, norm).scale_and_shift(module)
        running_mean = argument(norm, "running_mean")
        dtype = tensor_of(module, running_mean).dtype
        if val.dtype is not dtype:
            continue  # batch norm supports mixed dtypes, a convolution does not
        path = str(running_mean.target).rpartition(".")[0]
        reads = []
        for name, tensor in (("folded_weight", scale.reshape(-1, *[1] * (places + 1))), ("folded_bias", shift)):
            full = unused_name(module, f"{path}.{name}" if path else name)
            set_tensor(module, full, tensor.to(dtype), parameter=True)
            reads.append(read_attribute(module, full, norm, norm))
        with module.graph.inserting_before(norm):
            args = (norm.args[0], *reads, [1] * places, [0] * places, [1] * places, len(scale))
            convolution = module.graph.call_function(convolve, args)
        convolution.meta = {k: v for k, v in norm.meta.items() if k not in (SWITCHED, FROZEN)}
        norm.replace_all_uses_with(convolution)
        module.graph.erase_node(norm)
    drop_unused(module)


def norm_as_arithmetic(module: GraphModule) -> None:
    """Replace each batch norm of any rank that is a constant scale and shift by a product and a sum, one value per channel.

    In place, for inference. The caller recompiles.
    """
    for norm in list(module.graph.nodes):
        if not _is_affine(norm) or (val := value(norm)) is None:
            continue
        scale, shift = NormedLayer(norm, norm, norm).scale_and_shift(module)
        path = str(argument(norm, "running_mean").target).rpartition(".")[0]
        new = norm.args[0]
        for name, tensor, apply in (("scale", scale, aten.mul.Tensor), ("shift", shift, aten.add.Tensor)):
            full = unused_name(module, f"{path}.folded_{name}" if path else f"folded_{name}")
            set_tensor(module, full, tensor.to(val.dtype).reshape(-1, *[1] * (val.ndim - 2)), parameter=True)
            read = read_attribute(module, full, norm, norm)
            with module.graph.inserting_before(norm):
                new = module.graph.call_function(apply, (new, read))
            new.meta = {k: v for k, v in norm.meta.items() if k != SWITCHED}
        norm.replace_all_uses_with(new)
        module.graph.erase_node(norm)
    drop_unused(module)


def fold_into_bias(module: GraphModule, pair: NormedLayer, reads: Reads) -> None:
    """Replace the batch norm of ``pair`` by the layer's bias. The layer's integer weight already includes the norm's scale."""
    _replace_norm(module, pair, _fold_bias(module, pair, reads))


def _replace_norm(module: GraphModule, pair: NormedLayer, bias: str) -> None:
    moments = pair.output_moments(module)
    set_argument(pair.layer, "bias", read_attribute(module, bias, pair.layer, pair.layer))
    pair.layer.meta[OUTPUT_MOMENTS] = moments
    pair.norm.replace_all_uses_with(pair.layer)
    module.graph.erase_node(pair.norm)


def _fold_weight(module: GraphModule, pair: NormedLayer, reads: Reads) -> str:
    """Create the folded weight of ``pair`` and return its name: the layer's own if no other call reads that weight."""
    scale, _ = pair.scale_and_shift(module)
    weight = tensor_of(module, pair.weight).detach()
    folded = (weight.double() * pair.per_weight(scale, module)).to(weight.dtype)
    name = str(pair.weight.target)
    name = name if reads[name] == 1 else unused_name(module, name)
    learns = _learns(module, pair.weight, argument(pair.norm, "weight"))
    set_tensor(module, name, folded, parameter=True, learns=learns)
    return name


def _fold_bias(module: GraphModule, pair: NormedLayer, reads: Reads) -> str:
    """Create the folded bias of ``pair`` and return its name: the layer's own if it is free."""
    folded = pair.folded_bias(module).to(tensor_of(module, pair.weight).dtype)
    prefix = str(pair.weight.target).rpartition(".")[0]
    name = f"{prefix}.bias" if prefix else "bias"
    own = argument(pair.layer, "bias")
    replaceable = own is not None and str(own.target) == name and reads[name] == 1
    name = name if replaceable else unused_name(module, name)
    learns = _learns(module, pair.weight, own, argument(pair.norm, "bias"))
    set_tensor(module, name, folded, parameter=True, learns=learns)
    return name


def _learns(module: GraphModule, *reads: Node | None) -> bool:
    """Whether any of the parameters that ``reads`` read is not frozen."""
    return any(tensor_of(module, read).requires_grad for read in reads if read is not None)
