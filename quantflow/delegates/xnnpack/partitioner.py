"""The partitioner for XNNPACK: as few delegate calls as the graph order allows, of operators that run correctly."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from executorch.backends.xnnpack.partition.config.gemm_configs import GEMMConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import XNNPartitionerConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import (
    IS_IMPLICIT_Q_DQ_TAG,
    is_dequant,
    is_quant,
)
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition

from quantflow.delegates.xnnpack import int8
from quantflow.graph.aten import node_argument
from quantflow.graph.partitioning import delegate_calls
from quantflow.graph.state import is_written

# Operators that the partitioner keeps whole and that have no portable kernel.
_WITHOUT_KERNEL = frozenset({"hardswish.default", "max_pool2d.default", "prelu.default"})
_DIMENSIONS = 6  # the highest rank of XNNPACK's tensors


class Int8Partitioner(XnnpackPartitioner):
    """XNNPACK's partitioner with quantflow's configurations, and as few delegate calls as the graph order allows.

    Args:
        refused: Names of edge nodes to leave out.
        one_by_one: Put every operator in its own partition, to find the operators that the delegate refuses.
    """

    def __init__(self, refused: frozenset[str] = frozenset(), *, one_by_one: bool = False) -> None:
        super().__init__(configs=[config for config in int8.CONFIGS if not _would_be_stranded(config, refused)])
        self.one_by_one = one_by_one
        for config in self.target_partitioner_configs.values():
            config.check_constraints = _unless(refused, config.check_constraints)
            config.check_constraints = _without_state(config, config.check_constraints)
            if isinstance(config, GEMMConfig):
                config.check_constraints = _with_own_bias(config, config.check_constraints)
            config.get_partition = self._noting(config.get_partition)
        self._taken: list[tuple[Callable, Node]] = []  # operators with the function that returns their partition

    def _noting(self, get_partition: Callable) -> Callable:
        def noted(node: Node, ep: ExportedProgram) -> list[Node]:
            self._taken.append((get_partition, node))
            return get_partition(node, ep)

        return noted

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """Return the partitions. Operators that can run in one call share a partition.

        The check whether the delegate takes an operator tags the conversions around it as parts of its kernel, and the delegate
        then leaves them out. Only the tags of operators that are taken may stay.
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
        for node, stage in delegate_calls(ep.graph, delegated, _belongs_to_reader(delegated)).items():
            if node in delegated:
                partitions.setdefault(stage, []).append(node)
        return [Partition(id=i, nodes=dict.fromkeys(nodes)) for i, nodes in enumerate(partitions.values())]

    def _operators(self, ep: ExportedProgram) -> list[Partition]:
        taken: set[Node] = set()
        partitions: list[Partition] = []
        for node in ep.graph.nodes:
            config = self.target_partitioner_configs.get(int8.target_name(node))
            if config is None or is_quant(node) or is_dequant(node) or not config.check_constraints(node, ep):
                continue
            nodes = [n for n in config.get_partition(node, ep) if n not in taken]
            taken.update(nodes)
            partitions.append(Partition(id=len(partitions), nodes=dict.fromkeys(nodes)))
        return partitions


def _belongs_to_reader(delegated: set[Node]) -> Callable[[Node], bool]:
    """Whether a node moves to the call of its users: a constant, which is copied to each call, or a dequantize that only
    delegated nodes read. A dequantize that a portable kernel reads must not wait.
    """
    return lambda node: node.op == "placeholder" or (is_dequant(node) and delegated.issuperset(node.users))


def _would_be_stranded(config: type[XNNPartitionerConfig], refused: frozenset[str]) -> bool:
    """Whether ``config`` keeps an operator whole that no portable kernel runs, and ``refused`` has a node of it. All nodes of
    this operator are then decomposed, because the names of the other nodes would change.
    """
    name = config.target_name
    whole = name in _WITHOUT_KERNEL
    return whole and any(re.fullmatch(rf"aten_{re.escape(name.replace('.', '_'))}(_\d+)?", node) for node in refused)


def _unless(refused: frozenset[str], check: Callable[[Node, ExportedProgram], bool]) -> Callable:
    def taken(node: Node, ep: ExportedProgram) -> bool:
        allowed = node.name not in refused and _highest_rank(node) <= _DIMENSIONS
        return allowed and not _quantizes_a_scalar(node) and check(node, ep)

    return taken


def _quantizes_a_scalar(node: Node) -> bool:
    """Whether ``node`` quantizes a tensor without dimensions. A pass of the delegate's compiler fails on it."""
    given = node_argument(node).meta.get("val") if is_quant(node) else None
    return isinstance(given, torch.Tensor) and given.ndim == 0


def _without_state(config: XNNPartitionerConfig, check: Callable[[Node, ExportedProgram], bool]) -> Callable:
    """``check``, and no tensor that the delegate would keep as a constant is a buffer that the program writes."""

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
    """``check``, and no other layer shares the bias: its int32 scale follows from the input scale of its first reader."""

    def own(node: Node, ep: ExportedProgram) -> bool:
        bias = node.args[config.bias_idx] if config.bias_idx is not None and len(node.args) > config.bias_idx else None
        readers = list(bias.users) if isinstance(bias, Node) else [node]
        shared = readers[0] is not node and any(int8.is_static(n) for user in readers for n in user.all_input_nodes)
        return check(node, ep) and not shared

    return own
