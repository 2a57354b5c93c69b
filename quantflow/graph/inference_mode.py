"""Inference mode for a while, of any module."""

from __future__ import annotations

import contextlib
import functools
import inspect
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
    """The names of the layers of ``model`` that are in inference mode also while it trains.

    Those are what ``model.train()`` leaves so, as a model with frozen batch norm has it, and those whose class never asks for
    the mode: a ``F.batch_norm(..., training=False)`` in it is meant. ``model`` is left in inference mode.
    """
    if isinstance(model, GraphModule):  # what a capture found; a graph of stock torch holds its mode on its nodes
        return frozenset(layer(node) for node in model.graph.nodes if node.meta.get(FROZEN))
    model.train()
    layers = list(model.named_modules(remove_duplicate=False))
    frozen = frozenset(name for name, m in layers if not m.training or not _asks_for_mode(type(m)))  # type: ignore[arg-type]
    model.eval()
    return frozen


@functools.cache
def _asks_for_mode(kind: type) -> bool:
    """Whether the source of a class of layers, or a function of its file that it calls, reads the mode of a module; True where
    there is no source.
    """
    classes = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    try:
        return any(_reads_mode(inspect.getsource(base), inspect.getmodule(base)) for base in classes)
    except (OSError, TypeError):  # typed into a console, or a graph
        return True


def _reads_mode(source: str, file: object) -> bool:
    functions = (f for name, f in vars(file).items() if inspect.isfunction(f) and f"{name}(" in source)
    return ".training" in source or any(".training" in inspect.getsource(f) for f in functions)
