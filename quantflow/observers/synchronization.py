"""What the observers of a graph saw in several processes, put together."""

from __future__ import annotations

from collections.abc import Iterator

import torch.ao.quantization as ao
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import observer as pt2e_observer

from quantflow.digest import digest
from quantflow.distributed import Peers, widest, world_size
from quantflow.errors import QuantflowError
from quantflow.observers.base import Observer
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import is_fake_quantizer, observers_of, watching

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
    """Refuse observers whose ranges would differ between processes after a calibration.

    Raises:
        QuantflowError: at stage ``"calibrate"``, naming the first.
    """
    for name, inner in _of_torchao(graph):
        if type(inner) not in _EXTREMES or is_fake_quantizer(graph.get_submodule(name)):
            raise _refusal("calibrate", name, inner)


def check_synchronizable_in_training(graph: GraphModule) -> None:
    """Refuse fake quantizers whose ranges would follow, in each of several processes, its own data alone.

    Raises:
        QuantflowError: at stage ``"train"``, naming the first.
    """
    for name, inner in _of_torchao(graph):
        outer = graph.get_submodule(name)
        if not getattr(outer, "is_dynamic", False) and bool(getattr(outer, "observer_enabled", True)):
            raise _refusal("train", name, inner)


def _of_torchao(graph: GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """What watches the data by torchao's rules and holds a range, by the name of the observer; nothing in one process."""
    for name, observer in observers_of(graph).items() if world_size() > 1 else ():
        inner = watching(observer)
        theirs = is_fake_quantizer(observer) and not isinstance(observer, FakeQuantize)
        if (theirs or not isinstance(inner, Observer)) and hasattr(inner, "min_val"):
            yield name, inner


def _refusal(stage: str, name: str, inner: nn.Module) -> QuantflowError:
    reason = f"what {type(inner).__name__} of torchao saw in each of several processes can't be put together"
    remedy = f"{stage} in one process, or with a quantizer whose observers are quantflow's"
    return QuantflowError(stage, reason, node=name, remedy=remedy)


def begin_together(graph: GraphModule, peers: Peers) -> None:
    """Before a calibration: what all processes hold alike was seen once, by all, and not once by each.

    Raises:
        QuantflowError: at stage ``"calibrate"``, where the processes have other graphs.
    """
    if world_size() == 1:
        return
    watched = [inner for o in observers_of(graph).values() if isinstance(inner := watching(o), Observer)]
    everyone = peers.answers([digest(inner.state_dict()) for inner in watched])
    if (other := next((rank for rank, all_ in enumerate(everyone) if len(all_) != len(watched)), None)) is not None:
        remedy = "the same script for all processes"
        raise QuantflowError("calibrate", "it has other observers", node=f"rank {other}", remedy=remedy)
    for inner, digests in zip(watched, zip(*everyone, strict=True), strict=True):
        if len(set(digests)) == 1:
            inner.hold_in_common()


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
