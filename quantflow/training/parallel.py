"""The loss of a batch, with gradients averaged over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from quantflow import distributed
from quantflow.data.batches import Batch
from quantflow.errors import QuantflowError
from quantflow.graph.aten import aten, value
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.observers.learned_step_size import LearnedStepSize
from quantflow.training.distillation import MixedLoss
from quantflow.training.schedule import Schedule
from quantflow.upstream.grad_mode import set_grad_enabled

Loss = Callable[[Any, Any], torch.Tensor]


class BatchLoss(nn.Module):
    """A module that computes the loss of a batch. Its gradient is what ``DistributedDataParallel`` averages.

    Args:
        graph: The trained graph.
        loss: The loss of output and target; None if that of ``mixed`` alone counts.
        compile: Whether to run the graph through ``torch.compile``.

    Attributes:
        mixed: The loss with distillation; None without distillation.
    """

    def __init__(self, graph: TrainableGraphModule, loss: Loss | None, *, compile: bool) -> None:
        super().__init__()
        self.network: Any = torch.compile(graph) if compile else graph
        self.loss = loss
        self.mixed: MixedLoss | None = None

    def forward(self, batch: Batch, index: int) -> torch.Tensor:
        if batch.target is None and self.loss is not None:
            remedy = (
                "give (inputs, target) batches, or learn from a teacher alone: qf.Distillation(teacher, weight=1.0)"
            )
            raise QuantflowError("train", "the batch has no target", node=f"batch {index}", remedy=remedy)
        output = self.network(*batch.args, **batch.kwargs)
        value = None if self.loss is None else self.loss(output, batch.target)
        if self.mixed is not None:
            return self.mixed(value, output, batch.args, batch.kwargs)
        return cast(torch.Tensor, value)


def in_parallel(
    batch_loss: BatchLoss, graph: TrainableGraphModule, device: torch.device, schedule: Schedule
) -> nn.Module:
    """``batch_loss`` of ``graph`` with gradients averaged over all processes.

    Buffers stay equal because batch norm statistics and ranges are synchronized.
    """
    if distributed.world_size() == 1:
        return batch_loss
    devices = [device] if device.type == "cuda" else None
    # A learned scale has no gradient before rounding begins.
    idle = schedule.fake_quantize > 0 and any(isinstance(m, LearnedStepSize) for m in graph.modules())
    return nn.parallel.DistributedDataParallel(
        batch_loss, device_ids=devices, broadcast_buffers=False, find_unused_parameters=idle or not _all_learn(graph)
    )


def _all_learn(graph: TrainableGraphModule) -> bool:
    """Whether each parameter certainly has a gradient in every step."""
    enabled, without = True, set()
    for node in graph.graph.nodes:
        if node.target is set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled or node.target in (aten.detach.default, aten.detach_.default) or _is_discrete(node):
            without.add(node)
    (output,) = graph.graph.find_nodes(op="output")
    if len(output.all_input_nodes) > 1:  # the loss may read only some of the outputs
        return False
    learning, left = set[Node](), [output]
    while left:
        node = left.pop()
        if node not in learning and node not in without:
            learning.add(node)
            left.extend(node.all_input_nodes)
    read = {str(node.target) for node in learning if node.op in ("get_attr", "call_module")}
    named = [name for name, p in graph.named_parameters() if p.requires_grad]
    return all(any(name == r or name.startswith(f"{r}.") for r in read) for name in named)


def _is_discrete(node: Node) -> bool:
    """Whether the value of ``node`` is an integer or boolean tensor, which has no gradient."""
    val = value(node)
    return val is not None and not (val.is_floating_point() or val.is_complex())
