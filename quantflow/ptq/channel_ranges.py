"""The largest absolute value in each channel of the float network's activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

from quantflow.data.sample import Inputs
from quantflow.simulation.interpreter import Interpreter


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
        for node, values in Interpreter(graph).run(batch):
            if node in axes:
                largest = rows_of_channels(values[node], axes[node]).abs().amax(0).double()
                found[node] = torch.maximum(found[node], largest) if node in found else largest
    return found


def rows_of_channels(x: torch.Tensor, axis: int) -> torch.Tensor:
    """``x`` as [rows, channels], the channels those of dimension ``axis``; a single row where it has no other dimension."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])
