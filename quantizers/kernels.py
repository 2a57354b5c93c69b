"""Tables of the operators that a backend runs in float, for operators without a quantization rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from quantflow.graph.rewrites import Rewrite
from quantflow.upstream.operators import OpOverload

# A check of whether a backend runs a node of an operator in float.
Runs = Callable[[Node], bool]


@dataclass(frozen=True)
class FloatKernels:
    """The float operators that a backend runs, in core ATen and beyond.

    Attributes:
        runs: The operators that it runs, each with a check on the node. Views count as copies.
        whole: Of these, those that lowering does not decompose where the check agrees.
        between: Of these, those that it runs in integers wherever integers stand around them, asked or not.
        dtypes: The dtypes of the tensors it takes; all tensors of an operator have the same.
        rewrites: How lowering writes further operators as float operators.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import FloatKernels, RuleQuantizer, XNNPACK_RULES
        >>> class Quantizer(RuleQuantizer):
        ...     rules = XNNPACK_RULES
        ...     float_kernels = FloatKernels({torch.ops.aten.tanh.default: lambda node: True}, frozenset())
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh()).eval()
        >>> Quantizer(skip=torch.nn.Tanh).plan(qf.export(model, (torch.randn(1, 8),)).module()).calls
        1
    """

    runs: Mapping[OpOverload, Runs]
    whole: frozenset[OpOverload]
    between: frozenset[OpOverload] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float16})
    rewrites: Mapping[OpOverload, Rewrite] = field(default_factory=dict)

    def run(self, node: Node) -> bool:
        """Tell whether the backend runs a node in float.

        Args:
            node: A node whose ``val``, and those of its inputs, are fake tensors of known shape.

        Returns:
            True where it does.
        """
        check = self.runs.get(node.target) if isinstance(node.target, OpOverload) else None
        if check is None:
            return False
        values = [given.meta["val"] for given in (*node.all_input_nodes, node)]
        first = [val[0] if isinstance(val, (tuple, list)) else val for val in values]  # further outputs are indices
        dtypes = {val.dtype for val in first}
        return len(dtypes) == 1 and dtypes <= self.dtypes and all(val.numel() for val in first) and check(node)
