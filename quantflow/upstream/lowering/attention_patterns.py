"""The patterns of attention are traced only for a graph that they can match.

Names: ``call`` of ``executorch.backends.xnnpack._passes.convert_to_sdpa.ConvertToSDPAPass`` and ``sdpa`` of its module, which
are replaced.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from quantflow.upstream.replaced import replaced


def attention_patterns_if_possible() -> contextlib.AbstractContextManager:
    """Both attention patterns contain a softmax of a sum (the mask). A graph without this softmax can't match."""
    from executorch.backends.xnnpack._passes import convert_to_sdpa

    from quantflow.upstream.edge_operators import ops

    call = convert_to_sdpa.ConvertToSDPAPass.call
    softmax, add = ops.edge.aten._softmax.default, ops.edge.aten.add.Tensor

    class NoPatterns:
        @staticmethod
        def get_graphs() -> list:
            return []

    def call_if_possible(self: Any, module: fx.GraphModule) -> PassResult:
        sources = [n.args[0] for n in module.graph.nodes if n.target == softmax]
        if any(isinstance(s, fx.Node) and s.target == add for s in sources):
            return call(self, module)
        with replaced(convert_to_sdpa, "sdpa", NoPatterns):
            return call(self, module)

    return replaced(convert_to_sdpa.ConvertToSDPAPass, "call", call_if_possible)
