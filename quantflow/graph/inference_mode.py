"""Inference mode for a while, of any module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from quantflow.graph.graph_module import TrainableGraphModule


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
