"""How large each channel of the float network's activations gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

from quantflow.recovery.sample import Inputs
from quantflow.recovery.walk import steps


@torch.no_grad()
def channel_ranges(graph: GraphModule, axes: Mapping[Node, int], sample: Iterable[Inputs]) -> dict[Node, torch.Tensor]:
    """The largest absolute value in each channel of some nodes of ``graph`` over ``sample``, float64.

    Args:
        graph: A captured graph.
        axes: The nodes, and which dimension of each holds channels.
        sample: Batches of flat inputs.
    """
    found: dict[Node, torch.Tensor] = {}
    for batch in sample:
        for node, values in steps(graph, batch):
            if node in axes:
                largest = values[node].movedim(axes[node], -1).flatten(0, -2).abs().amax(0).double()
                found[node] = torch.maximum(found[node], largest) if node in found else largest
    return found
