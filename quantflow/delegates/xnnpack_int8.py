"""The partitioner that admits to XNNPACK every operator that it runs in int8, and none that it would run wrongly.

executorch's own configurations keep most int8 kernels for float and accept nodes that the delegate then refuses to load.
Each class here widens or guards one of them. Where a guard says no, the node runs in float between two conversions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config import generic_node_configs as generic
from executorch.backends.xnnpack.partition.config.gemm_configs import GEMMConfig
from executorch.backends.xnnpack.partition.config.node_configs import BatchNormConfig, PreluConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType, XNNPartitionerConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import (
    IS_IMPLICIT_Q_DQ_TAG,
    is_dequant,
    is_dynamic_qdq,
    is_per_tensor,
    is_quant,
)
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.partitioner import Partition
from torch.fx.passes.infra.pass_base import PassResult

from quantflow.graph.staging import stages
from quantflow.graph.state import is_written


class _Integer(generic.GenericNodePartitionerConfig):
    """Also in int8, where dequantizes feed the node, a quantize follows it, and :meth:`runs` agrees."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        """Whether the int8 kernel takes ``node`` between the dequantizes ``inputs`` and the quantize ``output``."""
        return True

    def get_node_and_deps(self, node: Node, ep: ExportedProgram) -> list[Node]:
        output = _quantize_behind(node)
        quantized = output is not None and all(map(is_dequant, node.all_input_nodes))
        if quantized and not self.runs(node, node.all_input_nodes, output):  # type: ignore[arg-type]
            return [node]
        return super().get_node_and_deps(node, ep)


def _quantize_behind(node: Node) -> Node | None:
    """The quantize that alone reads ``node``, or the clamp that is fused with it."""
    users = list(node.users)
    while len(users) == 1 and _target_name(users[0]) in _FUSED:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and is_quant(users[0]) else None


_FUSED = {"relu.default", "hardtanh.default"}


class _SameGrid(_Integer):
    """Operators that move integers about: input and output must lie on one grid."""

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        return all(i.args[1:3] == output.args[1:3] for i in inputs)


def _bounded(low: float, high: float) -> type[_Integer]:
    """Operators whose kernel multiplies in fixed point: the step of what they sum is ``low`` to ``high`` of the output's."""

    class Bounded(_Integer):
        def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
            steps: list[Any] = [given.args[1] for given in inputs]
            product = len(steps) == 2 and _target_name(node) == "mul.Tensor"
            sums = [math.prod(steps)] if product else steps
            return all(low <= step / output.args[1] < high for step in sums)  # type: ignore[operator]

    return Bounded


class _LeakyReLU(_Integer, generic.LeakyReLUConfig):
    """The kernel multiplies in fixed point with 8 fractional bits; beyond them it is wrong without a word."""

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        slope: Any = node.args[1] if len(node.args) > 1 else 0.01
        ratio: Any = inputs[0].args[1] / output.args[1]  # type: ignore[operator]
        return 2**-8 <= ratio <= 2**7 and 2**-8 <= abs(ratio * slope) <= 127


class _Elu(_Integer, generic.EluConfig):
    """The delegate drops ``scale`` and ``input_scale`` (SELU has them), and reads an ``alpha`` that may be left out."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        scales = [*node.args[2:4], 1, 1][:2]
        return len(node.args) > 1 and super().check_constraints(node, ep) and all(scale == 1 for scale in scales)


class _BatchedMatmul(_Integer, generic.BMMConfig):
    """The kernel knows no zero point in the second operand."""

    def runs(self, node: Node, inputs: list[Node], output: Node) -> bool:
        return node.args[1].args[2] == 0  # type: ignore[union-attr]


class _Prelu(_Integer, PreluConfig):
    """With a quantized slope in int8. Of another rank than 4, a pass of the delegate fails, in float too."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        given: Any = node.args[0]
        if given.meta["val"].dim() != 4:
            return False
        if is_dequant(node.args[1]):  # type: ignore[arg-type]
            return self.check_common_constraints(node, ep)
        return PreluConfig.check_constraints(self, node, ep)

    def get_node_and_deps(self, node: Node, ep: ExportedProgram) -> list[Node]:
        if is_dequant(node.args[1]):  # type: ignore[arg-type]
            return _Integer.get_node_and_deps(self, node, ep)
        return PreluConfig.get_node_and_deps(self, node, ep)


def _widened(
    base: type[XNNPartitionerConfig], kind: type[generic.GenericNodePartitionerConfig]
) -> type[XNNPartitionerConfig]:
    return type(f"{kind.__name__.strip('_')}{base.__name__}", (kind, base), {})


# Elementwise operators whose int8 kernels (tables, most of them) executorch keeps for float. Division, minimum and maximum
# have int8 kernels too, 80 and 20 times slower than the float ones.
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
)
# Batch norm is none of them: what is left of it reads what the program computes or writes to, which the delegate would take for
# constants.
_TARGETS = {config.target_name for config in (*_OURS, BatchNormConfig)}  # type: ignore[attr-defined]
CONFIGS = (*(config for config in ALL_PARTITIONER_CONFIGS if config.target_name not in _TARGETS), *_OURS)

# What the partitioner keeps from being decomposed, and no portable kernel runs.
_WITHOUT_KERNEL = frozenset({"hardswish.default", "max_pool2d.default", "prelu.default"})
_DIMENSIONS = 6  # XNNPACK's tensors have no more


class Int8Partitioner(XnnpackPartitioner):
    """XNNPACK's partitioner with these configurations, and as few delegate calls as the order of the graph allows.

    Args:
        refused: Names of edge nodes to leave out.
        one_by_one: A partition for every operator, to find out which of them the delegate refuses.
    """

    def __init__(self, refused: frozenset[str] = frozenset(), *, one_by_one: bool = False) -> None:
        super().__init__(configs=[config for config in CONFIGS if not _would_be_stranded(config, refused)])
        self.one_by_one = one_by_one
        for config in self.target_partitioner_configs.values():
            config.check_constraints = _unless(refused, config.check_constraints)  # type: ignore[method-assign]
            config.check_constraints = _without_state(config, config.check_constraints)  # type: ignore[method-assign]
            if isinstance(config, GEMMConfig):
                config.check_constraints = _with_own_bias(config, config.check_constraints)  # type: ignore[method-assign]
            config.get_partition = self._noting(config.get_partition)  # type: ignore[method-assign]
        self._taken: list[tuple[Callable, Node]] = []  # operators, with what gives their partition

    def _noting(self, get_partition: Callable) -> Callable:
        def noted(node: Node, ep: ExportedProgram) -> list[Node]:
            self._taken.append((get_partition, node))
            return get_partition(node, ep)

        return noted

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """Whatever can be called together is one partition.

        What asks whether the delegate takes an operator tags the conversions around it as parts of its kernel, which the
        delegate then leaves out. Only the tags of operators that are taken may stay.
        """
        self._taken.clear()
        partitions = self._operators(ep) if self.one_by_one else self._calls(ep)
        for node in ep.graph.nodes:
            node.meta.pop(IS_IMPLICIT_Q_DQ_TAG, None)
        for get_partition, node in self._taken:
            get_partition(node, ep)
        return partitions

    def _calls(self, ep: ExportedProgram) -> list[Partition]:
        delegated = {node for group in self.get_matched_nodes_from_configs(ep) for node in group}
        partitions: dict[int, list[Node]] = {}
        for node, stage in stages(ep.graph, delegated, _belongs_to_reader(delegated)).items():
            if node in delegated:
                partitions.setdefault(stage, []).append(node)
        return [Partition(id=i, nodes=dict.fromkeys(nodes)) for i, nodes in enumerate(partitions.values())]

    def _operators(self, ep: ExportedProgram) -> list[Partition]:
        taken: set[Node] = set()
        partitions: list[Partition] = []
        for node in ep.graph.nodes:
            config = self.target_partitioner_configs.get(_target_name(node))
            if config is None or is_quant(node) or is_dequant(node) or not config.check_constraints(node, ep):
                continue
            nodes = [n for n in config.get_partition(node, ep) if n not in taken]
            taken.update(nodes)
            partitions.append(Partition(id=len(partitions), nodes=dict.fromkeys(nodes)))
        return partitions


def _belongs_to_reader(delegated: set[Node]) -> Callable[[Node], bool]:
    """What stands with the node that it feeds: a constant, which is copied to each call that reads it, and a dequantize that no
    portable kernel reads (one that does must not wait).
    """
    return lambda node: node.op == "placeholder" or (is_dequant(node) and delegated.issuperset(node.users))


def _would_be_stranded(config: type[XNNPartitionerConfig], refused: frozenset[str]) -> bool:
    """Whether ``config`` keeps an operator whole that no portable kernel runs, and one of its nodes is among the ``refused``.
    All of them are decomposed then, since those that are left would change their names.
    """
    name = config.target_name
    whole = name in _WITHOUT_KERNEL
    return whole and any(re.fullmatch(rf"aten_{re.escape(name.replace('.', '_'))}(_\d+)?", node) for node in refused)


def _unless(refused: frozenset[str], check: Callable[[Node, ExportedProgram], bool]) -> Callable:
    return lambda node, ep: node.name not in refused and _highest_rank(node) <= _DIMENSIONS and check(node, ep)


def _without_state(config: XNNPartitionerConfig, check: Callable[[Node, ExportedProgram], bool]) -> Callable:
    """``check``, and none of what the delegate would keep as a constant is a buffer that the program writes."""

    def constant(node: Node, ep: ExportedProgram) -> bool:
        return check(node, ep) and not any(_is_state(given, ep) for given in config.get_node_and_deps(node, ep))

    return constant


def _is_state(node: Node, ep: ExportedProgram) -> bool:
    buffer = ep.graph_signature.inputs_to_buffers.get(node.name) if node.op == "placeholder" else None
    return buffer is not None and (buffer in ep.graph_signature.buffers_to_mutate.values() or is_written(node))


def _highest_rank(node: Node) -> int:
    values = (n.meta.get("val") for n in (node, *node.all_input_nodes))
    return max((val.ndim for val in values if isinstance(val, torch.Tensor)), default=0)


def _with_own_bias(config: GEMMConfig, check: Callable[[Node, ExportedProgram], bool]) -> Callable:
    """``check``, and the bias is not another layer's: as int32 it is in steps of its first reader's input."""

    def own(node: Node, ep: ExportedProgram) -> bool:
        bias = node.args[config.bias_idx] if config.bias_idx is not None and len(node.args) > config.bias_idx else None
        readers = list(bias.users) if isinstance(bias, Node) else [node]
        shared = readers[0] is not node and any(_is_static(n) for user in readers for n in user.all_input_nodes)
        return check(node, ep) and not shared

    return own


def _is_static(node: Node) -> bool:
    return is_dequant(node) and is_per_tensor(node) and not is_dynamic_qdq(node)


def _target_name(node: Node) -> str:
    return format_target_name(node.target.__name__) if node.op == "call_function" else ""  # type: ignore[union-attr]


def one_dequantize_per_user(module: GraphModule) -> PassResult:
    """Give every user a dequantize of its own.

    Decompositions make users that share one, and the delegate then confuses the memory layouts of float and int8 readers:
    it fails to run, or with equal dimensions gives wrong numbers.
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
