"""A context that puts a module into inference mode and restores its modes afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.upstream.modules import own_buffers, own_parameters


@contextlib.contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into inference mode within the context. Afterwards every submodule has its own mode again, and the tensors
    that its own ``train()`` changes are restored.
    """
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
            if not same_values(tensor, value):  # merging and separating weights rounds them
                tensor.detach().copy_(value)


def _switched_tensors(model: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor, torch.Tensor]]:
    """The tensors of modules with their own ``train()``, which may change them: container, name, tensor and value."""
    own = [m for m in model.modules() if type(m).train not in (nn.Module.train, TrainableGraphModule.train)]
    for module in {inner: None for m in own for inner in m.modules()}:
        for held in (own_parameters(module), own_buffers(module)):
            for name, tensor in held.items():
                if tensor is not None:
                    yield held, name, tensor, tensor.detach().clone()


def same_values(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both tensors have equal values, with NaN equal to NaN. Tensors on the meta device have none to compare."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if tensor.is_meta or torch.equal(tensor, other):
        return True
    return tensor.is_floating_point() and torch.allclose(tensor, other, 0.0, 0.0, equal_nan=True)


def set_mode(model: nn.Module, training: bool) -> None:
    """Call ``model.train(training)``. Stock torch graphs are skipped: they refuse it, because their nodes hold the mode."""
    refusing = [m for m in model.modules() if "train" in vars(m)]
    given = [m.train for m in refusing]
    try:
        for module in refusing:
            vars(module)["train"] = _unless_refused(module)
        model.train(training)
    finally:
        for module, train in zip(refusing, given, strict=True):
            vars(module)["train"] = train


def _unless_refused(module: nn.Module) -> Callable[[bool], nn.Module]:
    train = module.train

    def unless_refused(mode: bool = True) -> nn.Module:
        with contextlib.suppress(NotImplementedError):
            train(mode)
        return module

    return unless_refused
