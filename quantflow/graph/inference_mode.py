"""Inference mode for a while, of any module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from quantflow.graph.graph_module import TrainableGraphModule


@contextlib.contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every submodule gets its own mode back."""
    was = [(m, m.training) for m in model.modules()]
    try:
        set_mode(model, False)
        yield
    finally:
        for module, training in was:
            if isinstance(module, TrainableGraphModule):
                module.train(training)
            module.training = training


def set_mode(model: nn.Module, training: bool) -> None:
    """``model.train(training)``. A graph of stock torch refuses that, since its nodes hold its mode: it is passed over."""
    refusing = [m for m in model.modules() if "train" in vars(m)]
    given = [m.train for m in refusing]
    try:
        for module in refusing:
            module.train = _unless_refused(module)  # type: ignore[method-assign]
        model.train(training)
    finally:
        for module, train in zip(refusing, given, strict=True):
            module.train = train  # type: ignore[method-assign]


def _unless_refused(module: nn.Module) -> Callable[[bool], nn.Module]:
    train = module.train

    def unless_refused(mode: bool = True) -> nn.Module:
        with contextlib.suppress(NotImplementedError):
            train(mode)
        return module

    return unless_refused
