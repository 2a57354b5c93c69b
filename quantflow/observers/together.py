"""What the observers of a graph saw in several processes, put together."""

from __future__ import annotations

import torch.ao.quantization as ao
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import observer as pt2e_observer

from quantflow.distributed import widest, world_size
from quantflow.errors import QuantflowError
from quantflow.observers.base import Observer
from quantflow.observers.observation import observers_of, watching

# Observers of torchao that hold extremes and nothing else.
_EXTREMES = frozenset(
    {
        pt2e_observer.MinMaxObserver,
        pt2e_observer.PerChannelMinMaxObserver,
        ao.MinMaxObserver,
        ao.PerChannelMinMaxObserver,
    }
)


def check_synchronizable(graph: GraphModule) -> None:
    """Refuse observers whose ranges would differ between processes.

    Raises:
        QuantflowError: at stage ``"calibrate"``, naming the first.
    """
    if world_size() == 1:
        return
    for name, observer in observers_of(graph).items():
        inner = watching(observer)
        if not isinstance(inner, Observer) and type(inner) not in _EXTREMES and hasattr(inner, "min_val"):
            reason = f"what {type(inner).__name__} of torchao saw in each of several processes can't be put together"
            remedy = "calibrate in one process, or with a quantizer whose observers are quantflow's"
            raise QuantflowError("calibrate", reason, node=name, remedy=remedy)


def synchronize(graph: GraphModule) -> None:
    """Let each observer that watches a calibration take what all processes saw, the same in each."""
    for observer in observers_of(graph).values():
        inner = watching(observer)
        if isinstance(inner, Observer):
            if not inner.is_dynamic:
                inner.synchronize()
        elif type(inner) in _EXTREMES:
            _widen(inner)


def _widen(observer: nn.Module) -> None:
    if observer.min_val.numel():
        low, high = widest(observer.min_val, observer.max_val)
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
