"""The two forms of a prepared graph: for PTQ, with observers, and for QAT, with fake quantizers. Each can become the other."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.errors import QuantflowError
from quantflow.graph.aten import argument, set_argument
from quantflow.graph.batch_norm import fold_batch_norm, normed_layers
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import read_attribute, tensor_of
from quantflow.observers import FixedQParamsObserver, MinMaxObserver, Observer, PerGroupMinMaxObserver
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize, FakeQuantize
from quantflow.observers.observation import (
    affine,
    has_seen_data,
    is_fake_quantizer,
    observers_of,
    qparams_of,
)
from quantflow.observers.per_token_fake_quantize import PerTokenFakeQuantize
from quantflow.preparation.insertion import drop_uncalled_observers
from quantflow.qparams.per_token import is_per_token


def ptq_form(graph: GraphModule) -> TrainableGraphModule:
    """Return a copy of a graph prepared for QAT in the form of PTQ: batch norm folded, observers for fake quantizers.

    Args:
        graph: A prepared graph. One that is prepared for PTQ is copied.

    Returns:
        The copy, in inference mode. Its observers have the quantization parameters of the fake quantizers; those of the weights
        with a folded batch norm observed the folded weight.
    """
    ptq = adopt(graph).eval()
    _fold_observed_weights(ptq)
    for name, fake_quantizer in observers_of(ptq).items():
        if is_fake_quantizer(fake_quantizer):
            ptq.set_submodule(name, _observer_of(fake_quantizer))
    ptq.recompile()
    return ptq


def make_trainable(graph: TrainableGraphModule, fake_quantize: type[FakeQuantize] = FakeQuantize) -> None:
    """Replace, in place, the observers of a graph prepared for PTQ by fake quantizers with the same quantization parameters.

    Ranges do not follow the data in training: the fake quantizers have fixed or, with
    :class:`quantflow.LearnedStepSize`, trained scales.

    Args:
        graph: A graph that is prepared for PTQ and calibrated, by quantflow or by torchao.
        fake_quantize: The class of the fake quantizers of static scales.

    Raises:
        QuantflowError: at stage ``"train"``, when an observer saw no data, or a weight is quantized in groups.
    """
    readers = {str(node.target): node.users for node in graph.graph.nodes if node.op == "call_module"}
    made = {}
    for name, observer in observers_of(graph).items():
        if is_fake_quantizer(observer) or observer.dtype.is_floating_point:
            continue
        if isinstance(observer, PerGroupMinMaxObserver):
            remedy = "lower the graph as it is, or train with one scale per channel"
            raise QuantflowError("train", "weights in groups can't be trained", node=name, remedy=remedy)
        if not has_seen_data(observer):
            remedy = "call qf.calibrate(graph, data) first"
            raise QuantflowError("train", "the graph was not calibrated", node=name, remedy=remedy)
        if is_per_token(observer, readers[name]):
            made[name] = PerTokenFakeQuantize(MinMaxObserver(is_dynamic=True))
        elif getattr(observer, "is_dynamic", False):
            made[name] = FakeQuantize(_dynamic(observer))
        else:
            made[name] = fake_quantize(FixedQParamsObserver.like(observer, *qparams_of(observer)))
            made[name].update_qparams()
    for name, fake_quantizer in made.items():
        graph.set_submodule(name, fake_quantizer)
    graph.recompile()


def _fold_observed_weights(graph: TrainableGraphModule) -> None:
    """Fold batch norm into the observed weights of ``graph``, in place. Their observers then observe the folded weights."""
    observers: dict[Node, tuple[str, nn.Module]] = {}
    for pair in normed_layers(graph.graph):
        call = argument(pair.layer, "weight")
        if call is not pair.weight:
            called = graph.get_submodule(str(call.target))
            inner = called.fake_quantize if isinstance(called, BatchNormScaledFakeQuantize) else called
            observers[pair.layer] = str(call.target), copy.deepcopy(inner)  # folding empties unread modules
            set_argument(pair.layer, "weight", read_attribute(graph, str(pair.weight.target), pair.layer, pair.weight))
    drop_dead_code(graph.graph)  # the calls of observers count as reads of a weight
    fold_batch_norm(graph)
    names: dict[str, str] = {}  # by folded weight: layers that share one share its observer
    for layer, (name, observer) in observers.items():
        read = argument(layer, "weight")
        folded = str(read.target)
        if folded not in names:
            names[folded] = name if name not in names.values() else f"{name}_{layer.name}"
            graph.add_submodule(names[folded], _observing(observer, tensor_of(graph, read)))
        with graph.graph.inserting_before(layer):
            call = graph.graph.call_module(names[folded], (read,))
        call.meta = {key: read.meta[key] for key in ("nn_module_stack", "stack_trace", "val") if key in read.meta}
        set_argument(layer, "weight", call)
    drop_dead_code(graph.graph)
    drop_uncalled_observers(graph)


@torch.no_grad()
def _observing(observer: nn.Module, weight: torch.Tensor) -> nn.Module:
    """``observer`` with the range of ``weight``."""
    inner = observer.activation_post_process if isinstance(observer, FakeQuantize) else observer
    if isinstance(inner, Observer):
        inner.reset()
    inner(weight)
    if isinstance(observer, FakeQuantize):
        observer.update_qparams()
    return observer


def _observer_of(fake_quantizer: nn.Module) -> nn.Module:
    """An observer with the quantization parameters of ``fake_quantizer``: the one that observed them, or one that is fixed."""
    if not isinstance(fake_quantizer, FakeQuantize):
        return FixedQParamsObserver.like(fake_quantizer, *qparams_of(fake_quantizer))
    if fake_quantizer.is_dynamic:
        return _dynamic(fake_quantizer)
    qparams = qparams_of(fake_quantizer)
    for observer in (fake_quantizer.calibrator, fake_quantizer.activation_post_process):
        if isinstance(observer, Observer) and has_seen_data(observer):
            theirs = observer.calculate_qparams()
            if all(torch.equal(ours, other.to(ours)) for ours, other in zip(qparams, theirs, strict=True)):
                return copy.deepcopy(observer)
    return FixedQParamsObserver.like(fake_quantizer, *qparams)


def _dynamic(observer: nn.Module) -> Observer:
    """An observer of the same integers whose range is that of each input."""
    given = affine(observer)
    return MinMaxObserver(given.dtype, given.quant_min, given.quant_max, given.qscheme, is_dynamic=True)
