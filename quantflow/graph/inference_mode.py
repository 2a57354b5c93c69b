"""Inference mode for a while, of any module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from quantflow.graph.graph_module import TrainableGraphModule


@contextlib.contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every submodule gets its own mode back, and what its own ``train()`` changes besides."""
    was = [(m, m.training) for m in model.modules()]
    switched = [*_switched_tensors(model)]
    try:
        set_mode(model, False)
        yield
    finally:
        for module, training in was:
            if module.training != training:
                set_mode(module, training)
        for module, training in was:
            module.training = training
        for held, name, tensor, value in switched:
            held[name] = tensor
            if not same_values(tensor, value):  # weights that are merged and taken apart again are rounded
                tensor.detach().copy_(value)


def _switched_tensors(model: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor, torch.Tensor]]:
    """The tensors of modules with a ``train()`` of their own, which may compute: where they are, their names and values."""
    own = [m for m in model.modules() if type(m).train not in (nn.Module.train, TrainableGraphModule.train)]
    for module in {inner: None for m in own for inner in m.modules()}:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield held, name, tensor, tensor.detach().clone()


def same_values(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same, NaN for NaN. On the meta device there is nothing to compare."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if tensor.is_meta or torch.equal(tensor, other):
        return True
    return tensor.is_floating_point() and torch.allclose(tensor, other, 0.0, 0.0, equal_nan=True)


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
