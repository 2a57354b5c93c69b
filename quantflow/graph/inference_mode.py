"""Inference mode for a while, of any module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule

from quantflow.aten import layer
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.modes import FROZEN


@contextlib.contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every submodule gets its own mode back."""
    was = [(m, m.training) for m in model.modules()]
    with contextlib.suppress(NotImplementedError):  # a graph of stock torch holds its mode on its nodes
        model.eval()
    try:
        yield
    finally:
        for module, training in was:
            if isinstance(module, TrainableGraphModule):
                module.train(training)
            module.training = training


def never_trained(model: nn.Module) -> frozenset[str]:
    """The names of the layers that ``model.train()`` leaves in inference mode, as a model with frozen batch norm has them.

    ``model`` is left in inference mode.
    """
    if isinstance(model, GraphModule):  # what a capture found; a graph of stock torch holds its mode on its nodes
        return frozenset(layer(node) for node in model.graph.nodes if node.meta.get(FROZEN))
    model.train()
    frozen = frozenset(name for name, m in model.named_modules(remove_duplicate=False) if not m.training)
    model.eval()
    return frozen
