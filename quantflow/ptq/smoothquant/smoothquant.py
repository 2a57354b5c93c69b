"""SmoothQuant: moves outlier channels of the inputs of linear layers into their weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from quantflow.data.batches import PickInputs
from quantflow.data.sample import Sample
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import LINEARS, argument, aten, op, set_argument, value
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.modes import BATCH_NORM
from quantflow.graph.parameters import is_constant, read_attribute, reads_of, set_tensor, tensor_of, unused_name
from quantflow.ptq.channel_ranges import channel_ranges
from quantflow.ptq.channel_scaling import divide_outputs, is_scalable, magnitudes, multiply_inputs
from quantflow.ptq.smoothquant.features import linear_readers
from quantflow.simulation.preconditions import check_float, draw

_STAGE = "smooth"
_NORMS = {  # and the parameters that scale their outputs
    aten.layer_norm.default: ("weight", "bias"),
    aten.rms_norm.default: ("weight",),
    BATCH_NORM: ("weight", "bias"),
}


@dataclass(frozen=True)
class _Smoothable:
    """A node whose output features are scaled, and the linear layers that read them."""

    source: Node
    readers: list[Node]


@torch.no_grad()
def smooth(
    graph: GraphModule, data: Sample | Iterable[object], strength: float = 0.5, *, inputs: PickInputs | None = None
) -> TrainableGraphModule:
    """Return a copy of ``graph`` whose linear layers read features of similar ranges; its function in float is the same.

    Each feature is divided by ``max|x|**strength / max|w|**(1 - strength)``, in the weight and bias of the norm (layer norm,
    RMS norm, batch norm), of the linear layer or of the constant factor that makes it, and the columns of the linear layers
    that read it are multiplied by that. Layers that read one norm (query, key, value) share the scale; where another operator
    reads it too, nothing is scaled. (Xiao et al. 2023, SmoothQuant, arXiv:2211.10438.)

    It hurts with weights of few bits (4), since the columns of outlier features then reduce the resolution of the others, and
    where a feature of ``data`` is small by chance. At ``strength`` 1 all features have equal ranges.

    Args:
        graph: What ``Exported.module()`` returned, before :func:`quantflow.prepare`; it is left as it was.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used.
        strength: The migration strength, 0 to 1: how far ranges of activations are moved into the weights.
        inputs: Picks the inputs out of a batch, where that is ambiguous.

    Returns:
        The copy. A warning says where there was nothing to smooth.

    Raises:
        QuantflowError: at stage ``"smooth"``, when the graph is none or prepared already, ``strength`` is out of range or a
            batch does not fit the graph.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import smooth
        >>> x = torch.randn(32, 8)
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)).eval()
        >>> graph = qf.export(model, (x,)).module()
        >>> torch.allclose(smooth(graph, [x])(x), graph(x), atol=1e-4)
        True
    """
    check_float(graph, _STAGE)
    if not 0 <= strength <= 1:
        raise QuantflowError(
            _STAGE, f"{strength} is not between 0 and 1", node="strength", remedy="0.5, as in the paper"
        )
    smoothed = adopt(graph)
    training = smoothed.training
    smoothed.eval()
    found = _smoothable(smoothed)
    if not found:
        reason = "no norm or linear layer is read by linear layers alone: the graph stays as it is"
        remedy = "nothing to do; equalize is for convolutions"
        warnings.warn(QuantflowWarning(_STAGE, reason, node="graph", remedy=remedy), stacklevel=2)
        return smoothed.train(training)
    sample = draw(smoothed, data, stage=_STAGE, inputs=inputs)
    ranges = channel_ranges(smoothed, {place.source: -1 for place in found}, sample)
    for place in found:
        weights = torch.stack([magnitudes(smoothed, layer).amax((0, 1)).double() for layer in place.readers]).amax(0)
        scale = ranges[place.source].to(weights) ** strength / weights ** (1 - strength)
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
        _divide(smoothed, place.source, scale)
        for layer in place.readers:
            multiply_inputs(smoothed, layer, scale)
    smoothed.recompile()
    return smoothed.train(training)


def smooths_norms(graph: GraphModule) -> bool:
    """Return whether :func:`smooth` divides the outputs of a layer norm or an RMS norm in ``graph``."""
    return any(op(place.source) in _NORMS and op(place.source) is not BATCH_NORM for place in _smoothable(graph))


def _smoothable(module: GraphModule) -> list[_Smoothable]:
    reads = reads_of(module.graph)
    found = []
    for node in module.graph.nodes:
        if _can_be_divided(module, node, reads) and (readers := linear_readers(module, node, reads)) is not None:
            found.append(_Smoothable(node, readers))
    return found


def _can_be_divided(module: GraphModule, node: Node, reads: Mapping[str, int]) -> bool:
    output = value(node)
    if output is None:
        return False
    if op(node) in LINEARS:
        return is_scalable(module, node, reads)
    if op(node) is aten.mul.Tensor:
        return _factor(module, node, reads) is not None
    if op(node) not in _NORMS:
        return False
    if op(node) is BATCH_NORM and output.ndim != 2:
        return False  # it counts dimension 1 as channels
    if op(node) is not BATCH_NORM and len(argument(node, "normalized_shape")) != 1:
        return False
    read = [argument(node, name) for name in _NORMS[op(node)]]
    return all(n is None or (is_constant(n) and reads[str(n.target)] == 1) for n in read)


def _factor(module: GraphModule, node: Node, reads: Mapping[str, int]) -> Node | None:
    """The constant, one number per feature, by which ``node`` multiplies."""
    for constant, other in (node.args[:2], node.args[1::-1]):
        if is_constant(constant) and isinstance(other, Node) and not is_constant(other):
            owned = reads[str(constant.target)] == 1
            tensor = tensor_of(module, constant)
            if owned and tensor.is_floating_point() and tensor.shape == node.meta["val"].shape[-1:]:
                return constant
    return None


def _divide(module: GraphModule, node: Node, scale: torch.Tensor) -> None:
    """Divide each output feature of ``node`` by ``scale``, float64 [features]."""
    if op(node) in LINEARS:
        divide_outputs(module, node, scale)
        return
    if op(node) is aten.mul.Tensor:
        constants = [_factor(module, node, reads_of(module.graph))]
    else:
        if argument(node, "weight") is None:
            _give_weight(module, node, scale)
        constants = [argument(node, name) for name in _NORMS[op(node)]]
    for read in constants:
        if read is not None:
            tensor = tensor_of(module, read).detach()
            divided = (tensor.double() / scale.to(tensor.device)).to(tensor.dtype)
            set_tensor(module, str(read.target), divided, parameter=True)


def _give_weight(module: GraphModule, norm: Node, scale: torch.Tensor) -> None:
    name = unused_name(module, f"{norm.name}_weight")
    set_tensor(module, name, torch.ones_like(scale).to(norm.meta["val"].dtype), parameter=True)
    set_argument(norm, "weight", read_attribute(module, name, norm, norm))
