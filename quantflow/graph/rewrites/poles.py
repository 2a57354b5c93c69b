"""Detection of tensors that feed functions that are steep near zero, where quantization has few levels."""

from __future__ import annotations

from torch.fx import Node

from quantflow.graph.aten import CONVOLUTIONS, LINEARS, aten, op

_STEEP = {
    *(aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar),
}
_GEMM = CONVOLUTIONS | LINEARS


def feeds_a_pole(node: Node, steps: int = 4) -> bool:
    """Whether the value of ``node`` reaches a function that is steep near zero within ``steps`` further operators."""
    for user in node.users:
        denominator = op(user) is aten.div.Tensor and user.args[1] is node
        if denominator or op(user) in _STEEP or (steps and op(user) not in _GEMM and feeds_a_pole(user, steps - 1)):
            return True
    return False
