"""A guard for machines without a GPU: a collective takes only tensors that were brought to the group's device.

With gloo every tensor passes, also one that NCCL would refuse. Here the group has a device of its own, which is made up: a
tensor is on it when ``carried`` has brought it there, it stays there through operators, and ``to`` and ``cpu`` bring it back.
"""

import functools

import torch
import torch.distributed as dist

from quantflow.distributed import batch_norm, collectives

_COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "gather")
_COLLECTIVES += (
    "scatter",
    "all_to_all",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
    "reduce_scatter_tensor",
)


class Carried(torch.Tensor):
    """A tensor on the group's device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            sized = [t for t in leaves if isinstance(t, torch.Tensor) and t.ndim]
            if not all(isinstance(t, Carried) for t in sized):
                raise RuntimeError(f"{func}: tensors on different devices")
            made = func(*args, **(kwargs or {}))
            kind = torch.Tensor if func in (torch.Tensor.to, torch.Tensor.cpu) else cls
            return made.as_subclass(kind) if isinstance(made, torch.Tensor) else made


def install():
    """Put up the guard, for the rest of this process; returns the names of the collectives that are used."""
    used = []

    def carried(tensor):
        return tensor.as_subclass(Carried)

    def guarded(collective):
        @functools.wraps(collective)
        def checked(*args, **kwargs):
            used.append(collective.__name__)
            backward = torch._C._current_graph_task_id() != -1  # a gradient is where its tensor was
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and not backward and not isinstance(tensor, Carried):
                    raise RuntimeError(f"No backend type associated with device type cpu ({collective.__name__})")
            return collective(*args, **kwargs)

        return checked

    collectives.carried = batch_norm.carried = carried
    for name in _COLLECTIVES:
        setattr(dist, name, guarded(getattr(dist, name)))
    return used
