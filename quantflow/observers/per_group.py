"""The per-group min-max observer, for weights of few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from quantflow.graph.aten import node_argument
from quantflow.graph.parameters import read_attribute, set_tensor, tensor_of, unused_name
from quantflow.observers.min_max import MinMaxObserver
from quantflow.qparams.qparams import quantize
from quantflow.upstream import quantized_decomposed  # noqa: F401  registers the operators


class PerGroupMinMaxObserver(MinMaxObserver):
    """Takes the least and the greatest value of each ``group`` inputs of each output channel of a weight ``[outputs, inputs]``.

    Scales are rounded to bfloat16, as kernels for such weights keep them (XNNPACK's do).

    Args:
        group: How many inputs share a scale; it divides their number.
        spec: The arguments of :class:`Observer`, by name.

    Example:
        >>> import torch
        >>> from quantflow.observers import PerGroupMinMaxObserver
        >>> observer = PerGroupMinMaxObserver(group=2, quant_min=-7, quant_max=7, qscheme=torch.per_channel_symmetric)
        >>> _ = observer(torch.tensor([[-7.0, 7.0, -14.0, 7.0]]))
        >>> observer.calculate_qparams()[0]
        tensor([[1., 2.]])
    """

    def __init__(self, group: int, **spec: Any) -> None:
        super().__init__(**spec)
        self.group = group

    def extremes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the greatest value of each group, float32 ``[outputs, groups]``."""
        groups = x.detach().unflatten(1, (-1, self.group))
        return groups.amin(-1).float(), groups.amax(-1).float()

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale (float32, of bfloat16's precision) and the zero point (int32), ``[outputs, groups]``."""
        scale, zero_point = super().calculate_qparams()
        return scale.bfloat16().float(), zero_point

    def convert(self, module: GraphModule, node: Node) -> None:
        """Replace an observed weight by integers and, for each user, a dequantize.

        Args:
            module: The graph, changed in place.
            node: The call of this observer on the weight.
        """
        weight = tensor_of(module, node_argument(node)).detach()
        scale, zero_point = (q.to(weight.device) for q in self.calculate_qparams())
        grid = (scale[..., None], zero_point[..., None], self.quant_min, self.quant_max)
        integers = quantize(weight.unflatten(1, (-1, self.group)), *grid).flatten(1).to(torch.int8)
        limits = (-self.quant_max - 1, self.quant_max)  # XNNPACK recognizes 4 bits by -8 and 7
        base, names = str(node_argument(node).target), []
        for suffix, tensor in (("quantized", integers), ("scale", scale), ("zero_point", zero_point.long())):
            names.append(unused_name(module, f"{base}_{suffix}"))
            set_tensor(module, names[-1], tensor, parameter=False)
        for user in list(node.users):
            reads = (read_attribute(module, name, user, node) for name in names)
            args: tuple[Argument, ...] = (*reads, *limits, torch.int8, self.group, weight.dtype)
            with module.graph.inserting_before(user):
                target = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
                dequantized = module.graph.call_function(target, args)
            dequantized.meta = dict(node.meta)
            user.replace_input_with(node, dequantized)
        module.graph.erase_node(node)
