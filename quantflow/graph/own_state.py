"""Saving and restoring the state of a module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from quantflow.graph.state import state_reads
from quantflow.upstream.modules import own_buffers, own_parameters


class OwnState:
    """A copy of the state that the graph of ``module`` writes, or of all its buffers if it has no graph.

    Later calls of modules that share the memory do not change the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        graph = module.graph if isinstance(module, GraphModule) else None
        read = None if graph is None else {str(n.target) for n in state_reads(graph)}
        self._held: list[tuple[dict[str, Any], str, torch.Tensor | None]] = []
        for path, owner in module.named_modules(remove_duplicate=False):
            for store in (own_buffers(owner),) if read is None else (own_buffers(owner), own_parameters(owner)):
                for name, tensor in store.items():
                    if read is None or (f"{path}.{name}" if path else name) in read:
                        self._held.append((store, name, tensor))
        self._values = [None if tensor is None else tensor.detach().clone() for *_, tensor in self._held]
        # A call may add buffers to the module.
        self._names = [(own_buffers(m), set(own_buffers(m))) for m in module.modules()] if read is None else []

    def put_back(self) -> None:
        """Restore this state in the module."""
        for store, names in self._names:
            for name in store.keys() - names:
                del store[name]
        for (store, name, tensor), value in zip(self._held, self._values, strict=True):
            if tensor is None or value is None or tensor.shape != value.shape:
                store[name] = None if value is None else value.clone()
                continue
            with torch.no_grad():
                tensor.detach().copy_(value)
            store[name] = tensor

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Give the module this state within the context, then save its new state here and restore the outer state."""
        outside = OwnState(self._module)
        self.put_back()
        try:
            yield
        finally:
            now = [store[name] for store, name, _ in self._held]
            self._values = [None if tensor is None else tensor.detach().clone() for tensor in now]
            outside.put_back()

    def shares(self, other: OwnState) -> bool:
        """Whether a tensor of this state shares memory with a tensor of the other."""
        ours, theirs = (
            {t.untyped_storage().data_ptr() for *_, t in state._held if t is not None and t.numel()}
            for state in (self, other)
        )
        return bool(ours & theirs)


@contextlib.contextmanager
def state_kept(module: nn.Module) -> Iterator[OwnState]:
    """Restore the state of ``module`` at the end of the context, which yields it."""
    kept = OwnState(module)
    try:
        yield kept
    finally:
        kept.put_back()
