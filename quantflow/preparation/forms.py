"""The two forms of a prepared graph: for PTQ, with observers, and for QAT, with fake quantizers. Each can become the other."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import fake_quantize as pt2e_fake_quantize
from torchao.quantization.pt2e import observer as pt2e_observer

from quantflow.errors import QuantflowError
from quantflow.graph.aten import argument, set_argument
from quantflow.graph.batch_norm import fold_batch_norm, normed_layers
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import is_constant, read_attribute, tensor_of
from quantflow.observers import FixedQParamsObserver, MinMaxObserver, Observer, PerGroupMinMaxObserver
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize, FakeQuantize
from quantflow.observers.moving_average import for_training
from quantflow.observers.observation import (
    affine,
    has_seen_data,
    is_fake_quantizer,
    observers_of,
    qparams_of,
    replace_observers,
)
from quantflow.observers.per_token_fake_quantize import PerTokenFakeQuantize
from quantflow.preparation.insertion import drop_uncalled_observers
from quantflow.preparation.prepare import observe_constant
from quantflow.qparams.per_token import is_per_token
from quantflow.qparams.qparams import PER_CHANNEL


def ptq_form(graph: GraphModule) -> TrainableGraphModule:
    """Return a copy of a graph prepared for QAT in the form of PTQ: batch norm folded, observers for fake quantizers.

    Args:
        graph: A prepared graph. One that is prepared for PTQ is copied.

    Returns:
        The copy, in the mode of ``graph``. Its observers have the quantization parameters of the fake quantizers; those of the
        weights with a folded batch norm observed the folded weight.
    """
    ptq = adopt(graph)
    training = ptq.training
    _fold_observed_weights(ptq.eval())
    found = {old: _observer_of(old) for old in observers_of(ptq).values() if is_fake_quantizer(old)}
    replace_observers(ptq, found)
    return ptq.train(training)


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
    observers = observers_of(graph)
    if any(map(is_fake_quantizer, observers.values())):
        return  # it is prepared for QAT
    calls = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    made: dict[nn.Module, nn.Module] = {}
    for name, observer in observers.items():
        if getattr(observer, "dtype", torch.float32).is_floating_point and not hasattr(observer, "convert"):
            continue  # it quantizes nothing
        _check_trains(name, observer)
        if is_per_token(observer, calls[name].users):
            made[observer] = PerTokenFakeQuantize(MinMaxObserver(is_dynamic=True))
        elif getattr(observer, "is_dynamic", False):
            made[observer] = FakeQuantize(for_training(_dynamic(observer), weight=False))
        else:
            kind = FakeQuantize if isinstance(observer, pt2e_observer.FixedQParamsObserver) else fake_quantize
            fixed = FixedQParamsObserver.like(observer, *qparams_of(observer))
            static = kind(fixed, None if is_constant(calls[name].args[0]) else copy.deepcopy(fixed))
            static.update_qparams()
            made[observer] = static
    replace_observers(graph, made)


def _check_trains(name: str, observer: nn.Module) -> None:
    if isinstance(observer, PerGroupMinMaxObserver):
        remedy = "lower the graph as it is, or train with one scale per channel"
        raise QuantflowError("train", "weights in groups can't be trained", node=name, remedy=remedy)
    if hasattr(observer, "convert") or not hasattr(observer, "qscheme"):
        reason = f"a {type(observer).__name__} of torchao can't be trained"
        raise QuantflowError("train", reason, node=name, remedy="prepare the graph with a quantizer of quantflow")
    if not has_seen_data(observer):
        remedy = "call qf.calibrate(graph, data) first"
        raise QuantflowError("train", "the graph was not calibrated", node=name, remedy=remedy)


def _fold_observed_weights(graph: TrainableGraphModule) -> None:
    """Fold batch norm into the observed weights of ``graph``, in place. Their observers then observe the folded weights."""
    fold_constants(graph)
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
    taken = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for layer, (name, observer) in observers.items():
        read = argument(layer, "weight")
        folded = str(read.target)
        if folded not in names:
            names[folded] = f"{name}_{layer.name}" if name in taken else name
            taken.add(names[folded])
            graph.add_submodule(names[folded], observing(observer, tensor_of(graph, read)))
        with graph.graph.inserting_before(layer):
            call = graph.graph.call_module(names[folded], (read,))
        call.meta = {key: read.meta[key] for key in ("nn_module_stack", "stack_trace", "val") if key in read.meta}
        set_argument(layer, "weight", call)
    drop_dead_code(graph.graph)
    drop_uncalled_observers(graph)


def observing(observer: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Return ``observer``, or one of its integers if it is fixed or torchao's, with the range of ``weight`` alone."""
    if not isinstance(observer, (FakeQuantize, Observer)) or isinstance(observer, FixedQParamsObserver):
        given = affine(observer)
        axis = int(given.ch_axis) if given.qscheme in PER_CHANNEL else 0
        observer = MinMaxObserver(given.dtype, given.quant_min, given.quant_max, given.qscheme, axis)
    observe_constant(observer, weight)
    return observer


def _observer_of(fake_quantizer: nn.Module) -> nn.Module:
    """An observer with the quantization parameters of ``fake_quantizer``: the one that observed them, or one that is fixed."""
    if getattr(fake_quantizer, "is_dynamic", False):
        return _dynamic(fake_quantizer)
    if isinstance(fake_quantizer, pt2e_fake_quantize.FixedQParamsFakeQuantize):
        return copy.deepcopy(fake_quantizer.activation_post_process)
    qparams = qparams_of(fake_quantizer)
    if isinstance(fake_quantizer, FakeQuantize):
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
