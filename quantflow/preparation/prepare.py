"""``prepare``: inserts observers (PTQ) or fake quantizers (QAT) into a captured graph."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from quantflow.capture.exported import Exported
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import argument, label
from quantflow.graph.batch_norm import NormedLayer, norm_as_convolution, normed_layers
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.constants import constant_calls, constant_values
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.flattened_norm import flatten_before_linear
from quantflow.graph.folding import fold_for_inference
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.half_precision import compute_in_float32, named
from quantflow.graph.parameters import drop_unused, is_constant, tensor_of
from quantflow.lowering.core_aten import CoreAten
from quantflow.observers import Observer
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize, FakeQuantize
from quantflow.observers.observation import affine, is_converted, observer_of, observers_of
from quantflow.preparation.insertion import (
    drop_uncalled_observers,
    insert_observers,
    is_inserted_fake_quantizer,
    make_observers,
)
from quantflow.preparation.writes import check_annotated_writes


def prepare(
    graph: GraphModule, quantizer: Quantizer, *, qat: bool = False, fake_quantize: type[FakeQuantize] = FakeQuantize
) -> TrainableGraphModule:
    """Annotate ``graph`` with ``quantizer`` and insert the observers or fake quantizers that the annotations ask for.

    Half precision becomes float32, which integers need beside them. For PTQ, constants are folded, batch norm is folded into
    the layer before it, and observers are inserted; calibrate the result. For QAT, batch norm stays, fused with the weights'
    fake quantization, weights that a layer computes stay computed, and fake quantizers are inserted; train the result. Both
    end in :func:`quantflow.convert`.

    Args:
        graph: What ``Exported.module()`` returned, or any pre-dispatch ATen ``GraphModule``. It is left as it was.
        quantizer: Any torchao pt2e ``Quantizer``.
        qat: Prepare for training.
        fake_quantize: The class of the fake quantizers in QAT: :class:`FakeQuantize`, whose ranges follow the data, or
            :class:`LearnedStepSize`, whose scales are trained. Not used for PTQ.

    Returns:
        The prepared graph: for PTQ in inference mode, for QAT in the mode of ``graph``.

    Raises:
        QuantflowError: at stage ``"prepare"``, when ``graph`` is no captured graph, nothing in it was quantized, or a tensor
            that is written in place and read elsewhere was annotated; at stage ``"plan"``, when a quantizer of this project
            refuses.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.observers import Observer
        >>> from quantizers import XNNPACKQuantizer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> graph = qf.export(model, (torch.randn(1, 3, 8, 8),)).module()
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer())  # observes the input, the weight and the output of the relu
        >>> sum(isinstance(module, Observer) for module in prepared.modules())
        3
    """
    _check(graph, quantizer)
    training = graph.training
    prepared = adopt(graph).eval()
    drop_dead_code(prepared.graph, trains=qat)
    _compute_in_float32(prepared)
    if qat:
        flatten_before_linear(prepared)
    else:
        fold_for_inference(prepared)
        norm_as_convolution(prepared)
    transformed = quantizer.transform_for_annotation(prepared)
    prepared = transformed if isinstance(transformed, TrainableGraphModule) else adopt(transformed)
    if not qat:
        fold_constants(prepared)  # weights that the quantizer's rewrites transpose
        drop_unused(prepared)
    quantizer.annotate(prepared)
    quantizer.validate(prepared)
    check_annotated_writes(prepared.graph)
    observers = make_observers(prepared, fake_quantize if qat else None)
    if not observers:
        raise QuantflowError(
            "prepare",
            f"{type(quantizer).__name__} quantized nothing in this graph",
            remedy="print(quantizer.plan(graph)) tells why, node by node; check the quantizer's rules and overrides",
        )
    quantizer.prepare_obs_or_fq_callback(prepared, observers)
    insert_observers(prepared, observers)
    for node in prepared.graph.nodes:
        node.meta.pop(Q_ANNOTATION_KEY, None)  # it is applied, and names nodes of this graph only
    if qat:
        for pair in normed_layers(prepared.graph):
            _fuse_weight_with_batch_norm(prepared, pair)
    observe_constants(prepared)
    drop_dead_code(prepared.graph, trains=qat)
    drop_uncalled_observers(prepared)
    prepared.recompile()
    return prepared.train(training and qat)


def _compute_in_float32(prepared: GraphModule) -> None:
    if half := compute_in_float32(prepared):
        reason = f"the graph computes in {named(half)}; what stays in float computes in float32, as integers need beside them"
        remedy = "nothing: inputs and outputs keep their dtype"
        warnings.warn(QuantflowWarning("prepare", reason, node="graph", remedy=remedy), stacklevel=3)


def observe_constants(module: GraphModule) -> None:
    """Run each weight observer once on its weight, so that calibration does not repeat it for every batch."""
    seen: set[nn.Module] = set()
    constants = constant_calls(module.graph)
    observed = {node: observer_of(node, module) for node in module.graph.nodes}
    given = [node.args[0] for node, observer in observed.items() if observer is not None]
    computed = constant_values(module, [node for node in given if node in constants])
    for node, observer in observed.items():
        if observer is None or not (is_constant(read := node.args[0]) or read in constants):
            continue
        observe_constant(
            observer, tensor_of(module, read) if is_constant(read) else computed[read], anew=observer not in seen
        )
        seen.add(observer)


@torch.no_grad()
def observe_constant(observer: nn.Module, constant: torch.Tensor, *, anew: bool = True) -> None:
    """Let an observer or fake quantizer of quantflow observe ``constant``: ``anew``, or besides what it observed before."""
    inner = observer.activation_post_process if isinstance(observer, FakeQuantize) else observer
    if isinstance(inner, Observer):
        if anew:
            inner.reset()
        inner(constant)
    if isinstance(observer, FakeQuantize):
        observer.update_qparams()


def _check(graph: nn.Module, quantizer: Quantizer) -> None:
    if isinstance(graph, CoreAten):
        reason, remedy = "a core ATen graph can't be prepared", "prepare Exported.module(), then export again"
        raise QuantflowError("prepare", reason, node="graph", remedy=remedy)
    if isinstance(graph, Exported) or not isinstance(graph, GraphModule):
        reason = f"{type(graph).__name__} is no captured graph"
        remedy = "pass qf.export(model, args).module()"
        raise QuantflowError("prepare", reason, node="graph", remedy=remedy)
    if not isinstance(quantizer, Quantizer):
        reason = f"{type(quantizer).__name__} is no torchao pt2e Quantizer"
        raise QuantflowError("prepare", reason, node="quantizer", remedy="pass an instance, as XNNPACKQuantizer()")
    if is_converted(graph):
        reason, remedy = "the graph is converted already", "prepare the graph that Exported.module() returned"
        raise QuantflowError("prepare", reason, node="graph", remedy=remedy)
    if observers_of(graph):
        reason, remedy = "the graph is prepared already", "prepare the graph that Exported.module() returned"
        raise QuantflowError("prepare", reason, node=next(iter(observers_of(graph))), remedy=remedy)


def _fuse_weight_with_batch_norm(module: TrainableGraphModule, pair: NormedLayer) -> None:
    """Make the fake quantizer of the layer's weight use the scale of the folded weight, if that scale differs."""
    node = argument(pair.layer, "weight")
    if not is_inserted_fake_quantizer(module, node):
        return
    fake_quantize = module.get_submodule(str(node.target))
    if scales_with_channels(fake_quantize, pair.channel_axis):
        return
    if pair.transposed and argument(pair.layer, "groups") != 1:
        remedy = "use per-channel symmetric weights, or leave the layer in float"
        reason = "grouped transposed convolution with batch norm can't be trained with a per-tensor scale"
        raise QuantflowError("prepare", reason, node=label(pair.layer), remedy=remedy)
    if len(node.users) > 1:  # another layer shares the weight, but not this scale
        fake_quantize = copy.deepcopy(fake_quantize)
        with module.graph.inserting_after(node):
            own = module.graph.node_copy(node)
        pair.layer.replace_input_with(node, own)
        own.target = f"{node.target}_{pair.layer.name}"
        node = own
    fused = BatchNormScaledFakeQuantize(fake_quantize, argument(pair.norm, "eps"), pair.channel_axis)
    module.add_submodule(str(node.target), fused)
    gamma, running_var = argument(pair.norm, "weight"), argument(pair.norm, "running_var")
    with module.graph.inserting_before(node):
        reads = [module.graph.get_attr(str(n.target)) if n is not None else None for n in (gamma, running_var)]
    node.args = (node.args[0], *reads)


def scales_with_channels(observer: nn.Module, axis: int) -> bool:
    """Whether the scale of a weight observer is proportional to each output channel (dimension ``axis``)."""
    return (
        getattr(observer, "qscheme", None) is torch.per_channel_symmetric
        and getattr(observer, "ch_axis", None) == axis
        and affine(observer).quant_min == -affine(observer).quant_max
    )
