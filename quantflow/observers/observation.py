"""Queries on observers and fake quantizers, quantflow's and torchao's: which they are, what they observed."""

from __future__ import annotations

import functools
from typing import Protocol, cast

import torch
import torch.ao.quantization as ao
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import fake_quantize as pt2e_fake_quantize
from torchao.quantization.pt2e import observer as pt2e_observer

from quantflow.graph.parameters import device_of
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.qparams.qparams import SYMMETRIC, choose_qparams
from quantflow.upstream.operators import OpOverload


class AffineObserver(Protocol):
    """What an observer or a fake quantizer with a scale and a zero point has, torchao's too."""

    dtype: torch.dtype
    qscheme: torch.qscheme
    ch_axis: int
    quant_min: int
    quant_max: int
    min_val: torch.Tensor
    max_val: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]: ...


_OBSERVERS = (
    pt2e_observer.ObserverBase,
    pt2e_observer.AffineQuantizedObserverBase,
    ao.ObserverBase,
)
_FAKE_QUANTIZERS = (pt2e_fake_quantize.FakeQuantizeBase, ao.FakeQuantizeBase)


def affine(observer: nn.Module) -> AffineObserver:
    """Return ``observer`` itself, typed as one with a scale and a zero point."""
    return cast(AffineObserver, observer)


def qparams_of_range(
    observer: AffineObserver, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point that the integers of ``observer`` have for a real range."""
    limits = {"quant_min": observer.quant_min, "quant_max": observer.quant_max}
    return choose_qparams(low.float(), high.float(), symmetric=observer.qscheme in SYMMETRIC, **limits)


def is_fake_quantizer(module: nn.Module) -> bool:
    """Whether ``module`` is a fake quantizer by torchao's protocol."""
    return isinstance(module, _FAKE_QUANTIZERS)


def is_observer(module: nn.Module) -> bool:
    """Whether ``module`` is an observer or a fake quantizer by torchao's protocol."""
    return isinstance(module, _OBSERVERS) or is_fake_quantizer(module)


def observers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The observers and fake quantizers of ``model`` by name.

    Observers inside a fake quantizer and observers that no node calls are not listed.
    """
    found: dict[str, nn.Module] = {}
    called = _called(model) if isinstance(model, GraphModule) else None
    outer = "\0"
    for name, module in model.named_modules():  # depth first: children follow their parent
        if is_observer(module) and not name.startswith(f"{outer}.") and (called is None or module in called):
            found[name] = module
            outer = name
    return found


def _called(module: GraphModule) -> set[nn.Module]:
    """The submodules that nodes of ``module`` call or get, and their submodules."""
    nodes = (node for node in module.graph.nodes if node.op in ("call_module", "get_attr"))
    read = (functools.reduce(getattr, str(node.target).split("."), module) for node in nodes)
    return {inner for value in read if isinstance(value, nn.Module) for inner in value.modules()}


def replace_observers(graph: GraphModule, by_old: dict[nn.Module, nn.Module]) -> None:
    """Replace observers of ``graph``, in place, each under all its names: torchao shares one by setting it under several."""
    device = device_of(graph)
    for name, module in list(graph.named_modules(remove_duplicate=False)):
        if module in by_old:
            graph.set_submodule(name, by_old[module].to(device=device))
    graph.recompile()


def watching(observer: nn.Module) -> nn.Module:
    """The module that calibration data reach: the calibrating observer of a fake quantizer, or ``observer`` itself."""
    if isinstance(observer, FakeQuantize):
        return observer.watching
    return getattr(observer, "activation_post_process", observer)


def is_converted(module: GraphModule) -> bool:
    """Whether ``module`` contains quantize or dequantize operators."""
    targets = (n.target for n in module.graph.nodes if isinstance(n.target, OpOverload))
    return any(target.namespace in ("quantized_decomposed", "torchao") for target in targets)


def observer_of(node: Node, module: GraphModule) -> nn.Module | None:
    """The observer in ``module`` that ``node`` calls; None if it calls none."""
    if node.op != "call_module":
        return None
    called = module.get_submodule(str(node.target))
    return called if is_observer(called) else None


def has_seen_data(observer: nn.Module) -> bool:
    """Whether ``observer`` has a range to quantize with. Dynamic observers and fixed parameters need none."""
    if getattr(observer, "is_dynamic", False):
        return True
    inner = getattr(observer, "activation_post_process", observer)
    low, high = getattr(inner, "min_val", None), getattr(inner, "max_val", None)
    if not isinstance(low, torch.Tensor) or not isinstance(high, torch.Tensor):
        return True
    return low.numel() > 0 and bool(torch.isfinite(low).all() and torch.isfinite(high).all())


def saw_no_number(observer: nn.Module) -> bool:
    """Whether NaN or infinity is in the range of ``observer``."""
    inner = affine(getattr(observer, "activation_post_process", observer))
    low, high = inner.min_val, inner.max_val
    return bool(low.isnan().any() or high.isnan().any() or (low == float("-inf")).any() or (high == float("inf")).any())


def qparams_of(observer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point to convert with: after QAT, those that training used."""
    theirs = is_fake_quantizer(observer) and not isinstance(observer, FakeQuantize)
    if theirs and isinstance(
        getattr(observer, "scale", None), torch.Tensor
    ):  # torchao's fake quantizers compute them again, by another formula
        return affine(observer).scale.detach(), affine(observer).zero_point.detach()
    scale, zero_point = affine(observer).calculate_qparams()
    return scale.detach(), zero_point.detach()
