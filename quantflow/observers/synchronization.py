"""Synchronization of observer statistics between processes."""

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
from quantflow.observers.observation import AffineObserver, affine, is_fake_quantizer, observers_of, watching

# Torchao's observers whose only state is the extremes.
_EXTREMES = frozenset(
    {
        pt2e_observer.MinMaxObserver,
        pt2e_observer.PerChannelMinMaxObserver,
        ao.MinMaxObserver,
        ao.PerChannelMinMaxObserver,
    }
)


def check_synchronizable(graph: GraphModule) -> None:
    """Raise for observers whose ranges would differ between processes after a calibration.

    Raises:
        QuantflowError: at stage ``"calibrate"``, naming the first such observer.
    """
    for name, inner in _of_torchao(graph):
        if type(inner) not in _EXTREMES or is_fake_quantizer(graph.get_submodule(name)):
            raise _refusal("calibrate", name, inner)


def check_synchronizable_in_training(graph: GraphModule) -> None:
    """Raise for fake quantizers whose ranges would follow only the data of their own process.

    Raises:
        QuantflowError: at stage ``"train"``, naming the first such fake quantizer.
    """
    for name, inner in _of_torchao(graph):
        outer = graph.get_submodule(name)
        if not getattr(outer, "is_dynamic", False) and bool(getattr(outer, "observer_enabled", True)):
            raise _refusal("train", name, inner)


def _of_torchao(graph: GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """Torchao's calibrating observers with a range, by the name of the observer; nothing in a single process."""
    for name, observer in observers_of(graph).items() if world_size() > 1 else ():
        inner = watching(observer)
        theirs = is_fake_quantizer(observer) and not isinstance(observer, FakeQuantize)
        if (theirs or not isinstance(inner, Observer)) and hasattr(inner, "min_val"):
            yield name, inner


def _refusal(stage: str, name: str, inner: nn.Module) -> QuantflowError:
    reason = f"what {type(inner).__name__} of torchao saw in several processes can't be merged"
    remedy = f"{stage} in one process, or with a quantizer whose observers are quantflow's"
    return QuantflowError(stage, reason, node=name, remedy=remedy)


def begin_together(graph: GraphModule, peers: Peers) -> None:
    """Mark the statistics that all processes have in common before a calibration, so that they count once.

    Raises:
        QuantflowError: at stage ``"calibrate"``, if the graphs of the processes differ.
    """
    if world_size() == 1:
        return
    watched = [inner for o in observers_of(graph).values() if isinstance(inner := watching(o), Observer)]
    everyone = peers.answers([digest(inner.state_dict()) for inner in watched])
    if (other := next((rank for rank, all_ in enumerate(everyone) if len(all_) != len(watched)), None)) is not None:
        remedy = "the same script for all processes"
        raise QuantflowError("calibrate", "its observers differ from rank 0's", node=f"rank {other}", remedy=remedy)
    for inner, digests in zip(watched, zip(*everyone, strict=True), strict=True):
        if len(set(digests)) == 1:
            inner.hold_in_common()


def synchronize(graph: GraphModule) -> None:
    """Merge the statistics of all processes in each calibrating observer."""
    for observer in observers_of(graph).values():
        inner = watching(observer)
        if isinstance(inner, Observer):
            if not inner.is_dynamic:
                inner.synchronize()
        elif type(inner) in _EXTREMES:
            _widen(affine(inner))


def _widen(observer: AffineObserver) -> None:
    if observer.min_val.numel():
        low, high = widest(observer.min_val, observer.max_val)
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
