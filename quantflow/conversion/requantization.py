"""Limits on the requantization ratio: the scale of an integer kernel's sums divided by the scale of its output.

An integer kernel multiplies its sums by this ratio. The output of a dead layer is zero for all calibration data: its scale is
so small that the ratio exceeds what backends accept. An output with 256 steps for each step of its sums loses nothing with a
larger scale, so its scale is increased to that.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.errors import QuantflowWarning
from quantflow.graph.aten import (
    INFERENCE_IDENTITIES,
    WEIGHTED,
    argument,
    aten,
    clamp_limits,
    label,
    node_argument,
    op,
)
from quantflow.graph.batch_norm import NormedLayer
from quantflow.graph.modes import BATCH_NORM
from quantflow.graph.parameters import is_constant
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize
from quantflow.observers.fixed import FixedQParamsObserver
from quantflow.observers.observation import has_seen_data, observer_of, qparams_of, watching
from quantflow.qparams.qparams import PER_CHANNEL

_MOST_STEPS = 255.0  # largest ratio; XNNPACK accepts less than 256
_PRODUCTS = {aten.mul.Tensor, aten.bmm.default, aten.matmul.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.mean.dim, aten.adaptive_avg_pool2d.default}
_NAMED = 5


def limit_resolution(module: GraphModule, norms: dict[Node, NormedLayer]) -> None:
    """Increase, in place, the scale of each activation to at least 1/255 of the scale of the sums it is computed from.

    Args:
        module: A calibrated or trained graph.
        norms: The batch norms that conversion folds, by layer.
    """
    for node in module.graph.nodes:
        observer = _static(module, node)
        if observer is None or is_constant(node.args[0]) or (step := _step_of_sums(module, node, norms)) is None:
            continue
        scale, zero_point = qparams_of(observer)
        least = step / _MOST_STEPS
        if float(scale) >= least:
            continue
        fixed = FixedQParamsObserver.like(observer, torch.full_like(scale, least), zero_point)
        for name, other in list(module.named_modules(remove_duplicate=False)):
            if other is observer:
                module.set_submodule(name, fixed)


def warn_of_dead_activations(module: GraphModule) -> None:
    """Warn of the layers whose output was zero for all calibration data."""
    dead = []
    for node in module.graph.nodes:
        observer = _static(module, node)
        if observer is None:
            continue
        low, high = (getattr(watching(observer), name, None) for name in ("min_val", "max_val"))
        if not isinstance(low, torch.Tensor) or not isinstance(high, torch.Tensor) or not low.numel():
            continue
        if not low.any() and not high.any() and not is_constant(node.args[0]):
            dead.append(label(_computed_by(node)))
    if not dead:
        return
    names = ", ".join(dead[:_NAMED]) + (f" and {len(dead) - _NAMED} more" if len(dead) > _NAMED else "")
    reason = "its values were zero for all data, so its integers can represent no other value"
    remedy = "calibrate with data that reach it; or the layer is dead, and can be left out of the network"
    warnings.warn(QuantflowWarning("calibrate", reason, node=names, remedy=remedy), stacklevel=3)


def _static(module: GraphModule, node: Node) -> nn.Module | None:
    """The observer that ``node`` calls, if it is static and per tensor; else None."""
    observer = observer_of(node, module)
    if observer is None or getattr(observer, "is_dynamic", False) or hasattr(observer, "convert"):
        return None
    if getattr(observer, "dtype", torch.float32).is_floating_point or getattr(observer, "qscheme", None) in PER_CHANNEL:
        return None
    return observer if has_seen_data(observer) else None


def _step_of_sums(module: GraphModule, node: Node, norms: dict[Node, NormedLayer]) -> float | None:
    """The scale of the integer sums from which the kernel computes the tensor that ``node`` observes; None if unknown."""
    source = _computed_by(node)
    if op(source) in WEIGHTED:
        given, weight = _scale(module, node_argument(source)), _weight_scale(module, source, norms)
        return None if given is None or weight is None else given * weight
    scales = [scale for n in source.all_input_nodes if (scale := _scale(module, n)) is not None]
    if not scales or len(scales) != len(source.all_input_nodes):
        return None
    if op(source) in _PRODUCTS:
        return scales[0] * scales[-1]
    return max(scales) if op(source) in _SUMS else None


def _computed_by(node: Node) -> Node:
    """The operator whose result the observer call ``node`` reads, with clamps and batch norm between them."""
    source = node_argument(node)
    while clamp_limits(source) is not None or op(source) in INFERENCE_IDENTITIES or op(source) is BATCH_NORM:
        source = node_argument(source)
    return source


def _scale(module: GraphModule, node: Node) -> float | None:
    while op(node) in INFERENCE_IDENTITIES:
        node = node_argument(node)
    observer = _static(module, node)
    return None if observer is None else float(qparams_of(observer)[0])


def _weight_scale(module: GraphModule, layer: Node, norms: dict[Node, NormedLayer]) -> float | None:
    """The largest scale of the layer's weight after batch norm folding."""
    node = argument(layer, "weight")
    if node.op != "call_module":
        return None
    observer = module.get_submodule(str(node.target))
    fused = isinstance(observer, BatchNormScaledFakeQuantize)
    if isinstance(observer, BatchNormScaledFakeQuantize):
        observer = observer.fake_quantize
    if getattr(observer, "is_dynamic", False) or hasattr(observer, "convert") or getattr(observer, "group", 0):
        return None
    if not has_seen_data(observer):
        return None
    scale = qparams_of(observer)[0].double()
    if layer in norms and not fused:
        scale = scale * norms[layer].scale_and_shift(module)[0].abs().to(scale)
    return float(scale.max())
