"""Partitioner configurations for every operator that XNNPACK runs correctly in int8.

executorch's own configurations restrict most operators to float, and accept nodes that the delegate then fails to load. Each
class here extends or restricts one of these configurations. A rejected node runs in float between two conversions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config import generic_node_configs as generic
from executorch.backends.xnnpack.partition.config.node_configs import BatchNormConfig, MaxDimConfig, PreluConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType, XNNPartitionerConfig
from executorch.backends.xnnpack.utils.quant_utils import (
    is_dequant,
    is_dynamic_qdq,
    is_per_tensor,
    is_quant,
)
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from quantflow.graph.aten import node_argument


class _Integer(generic.GenericNodePartitionerConfig):
    """An operator in float, or in int8 if its inputs are dequantized, its output is quantized and :meth:`runs` is true."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        """Whether the int8 kernel takes ``node`` between the dequantizes ``inputs`` and the quantize ``output``."""
        return True

    def get_node_and_deps(self, node: Node, ep: ExportedProgram) -> list[Node]:
        inputs, output = node.all_input_nodes, _quantize_behind(node)
        if output is not None and all(map(is_dequant, inputs)) and not self.runs(node, inputs, output):
            return [node]
        return super().get_node_and_deps(node, ep)


def _quantize_behind(node: Node) -> Node | None:
    """The quantize node that is the only user of ``node`` or of the clamp fused with it."""
    users = list(node.users)
    while len(users) == 1 and target_name(users[0]) in _FUSED:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and is_quant(users[0]) else None


_FUSED = {"relu.default", "hardtanh.default"}


class _SameGrid(_Integer):
    """Operators that only move integers: input and output must have the same scale and zero point."""

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        return all(i.args[1:3] == output.args[1:3] for i in inputs)


def _bounded(low: float, high: float) -> type[_Integer]:
    """Operators with a fixed-point kernel: input scale (or product of scales) over output scale is in [``low``, ``high``)."""

    class Bounded(_Integer):
        def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
            steps = [_scale(given) for given in inputs]
            product = len(steps) == 2 and target_name(node) == "mul.Tensor"
            sums = [math.prod(steps)] if product else steps
            return all(low <= step / _scale(output) < high for step in sums)

    return Bounded


def _scale(conversion: Node) -> float:
    """The scale of a quantize or dequantize node, per tensor."""
    return cast(float, conversion.args[1])


class _LeakyReLU(_Integer, generic.LeakyReLUConfig):
    """Leaky ReLU. The kernel multiplies in fixed point with 8 fractional bits and gives wrong results outside that range."""

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        slope = cast(float, node.args[1]) if len(node.args) > 1 else 0.01
        ratio = _scale(inputs[0]) / _scale(output)
        return 2**-8 <= ratio <= 2**7 and 2**-8 <= abs(ratio * slope) <= 127


class _Elu(_Integer, generic.EluConfig):
    """ELU. The delegate ignores ``scale`` and ``input_scale`` (SELU sets them), and fails if ``alpha`` is left out."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        scales = [*node.args[2:4], 1, 1][:2]
        return len(node.args) > 1 and super().check_constraints(node, ep) and all(scale == 1 for scale in scales)


class _BatchedMatmul(_Integer, generic.BMMConfig):
    """Batched matmul. The kernel supports no zero point in the second operand."""

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        return bool(node_argument(node, 1).args[2] == 0)


class _Prelu(_Integer, PreluConfig):
    """PReLU, in int8 if its slope is quantized. A pass of the delegate fails for ranks other than 4, also in float."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        if node_argument(node).meta["val"].dim() != 4:
            return False
        if is_dequant(node_argument(node, 1)):
            return self.check_common_constraints(node, ep)
        return PreluConfig.check_constraints(self, node, ep)

    def get_node_and_deps(self, node: Node, ep: ExportedProgram) -> list[Node]:
        if is_dequant(node_argument(node, 1)):
            return _Integer.get_node_and_deps(self, node, ep)
        return PreluConfig.get_node_and_deps(self, node, ep)


class _MaxDim(MaxDimConfig):
    """Maxima over a dimension that stays. Without ``keepdim`` the delegate's compiler fails."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        return len(node.args) > 2 and bool(node.args[2]) and super().check_constraints(node, ep)


def _widened(
    base: type[XNNPartitionerConfig], kind: type[generic.GenericNodePartitionerConfig]
) -> type[XNNPartitionerConfig]:
    return type(f"{kind.__name__.strip('_')}{base.__name__}", (kind, base), {})


# Elementwise operators with int8 kernels (mostly lookup tables) that executorch restricts to float. Division, minimum and
# maximum have int8 kernels that are 80 and 20 times slower than the float kernels.
_ELEMENTWISE = (
    generic.AbsConfig,
    generic.ExpConfig,
    generic.GeluConfig,
    generic.HardswishConfig,
    generic.NegConfig,
    generic.SigmoidConfig,
    generic.SquareRootConfig,
    generic.TanhConfig,
)
_MOVING = (
    generic.CatConfig,
    generic.CloneDimOrderConfig,
    generic.ConstantPadConfig,
    generic.MaxPool2dConfig,
    generic.PermuteConfig,
    generic.SliceCopyConfig,
    generic.UnsqueezeCopyConfig,
    generic.ViewCopyConfig,
)
_OURS = (
    *(_widened(base, _Integer) for base in _ELEMENTWISE),
    *(_widened(base, _SameGrid) for base in _MOVING),
    *(_widened(base, _bounded(0.0, 2**8)) for base in (generic.AddConfig, generic.SubConfig)),
    _widened(generic.MulConfig, _bounded(0.0, 2**8)),
    _LeakyReLU,
    _Elu,
    _BatchedMatmul,
    _Prelu,
    _MaxDim,
)
# Batch norm is left out: a batch norm that was not folded reads tensors that the program computes or writes, and the delegate
# would treat them as constants.
_TARGETS = {config.target_name for config in (*_OURS, BatchNormConfig)}
CONFIGS = (*(config for config in ALL_PARTITIONER_CONFIGS if config.target_name not in _TARGETS), *_OURS)


def target_name(node: Node) -> str:
    """Return the name of the operator that ``node`` calls, in the form of the configurations; ``""`` for other nodes."""
    return format_target_name(cast(Callable, node.target).__name__) if node.op == "call_function" else ""


def is_static(node: Node) -> bool:
    """Whether ``node`` dequantizes an activation whose scale and zero point are constants."""
    return is_dequant(node) and is_per_tensor(node) and not is_dynamic_qdq(node)


def one_dequantize_per_user(module: GraphModule) -> PassResult:
    """Give every user of a dequantize node its own copy.

    Decompositions create users that share one dequantize. The delegate then confuses the memory layouts of float and int8
    users: it fails to run, or gives wrong results if the dimensions are equal.
    """
    changed = False
    for node in list(module.graph.nodes):
        if node.op == "call_function" and is_dequant(node):
            for user in list(node.users)[1:]:
                with module.graph.inserting_before(user):
                    user.replace_input_with(node, module.graph.node_copy(node))
                changed = True
    if changed:
        module.recompile()
    return PassResult(module, changed)
