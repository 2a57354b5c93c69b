"""``convert``: replaces observers and fake quantizers by quantize / dequantize pairs, and weights by integers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.conversion.biases import round_biases, separate_biases
from quantflow.conversion.quantized_weights import IntegerTensor, integer_constant, is_weight
from quantflow.conversion.requantization import limit_resolution
from quantflow.errors import QuantflowError
from quantflow.graph.aten import (
    INFERENCE_IDENTITIES,
    argument,
    clamp_limits,
    has_argument,
    label,
    node_argument,
    only_user,
    op,
    value,
)
from quantflow.graph.batch_norm import NormedLayer, fold_batch_norm, fold_into_bias, normed_layers
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import (
    drop_unused,
    is_constant,
    read_attribute,
    reads_of,
    set_tensor,
    unused_name,
)
from quantflow.graph.state import writes_for_others
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize
from quantflow.observers.observation import (
    AffineObserver,
    affine,
    has_seen_data,
    is_observer,
    observer_of,
    observers_of,
    qparams_of,
    saw_no_number,
)
from quantflow.preparation.writes import check_observed_writes
from quantflow.qparams.per_token import is_per_token
from quantflow.qparams.qparams import PER_CHANNEL, SMALLEST_SCALE, SYMMETRIC
from quantflow.upstream import quantized_decomposed  # noqa: F401  registers the operators

decomposed = torch.ops.quantized_decomposed

_STORAGE = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


def convert(graph: GraphModule) -> TrainableGraphModule:
    """Replace every observer and fake quantizer by quantize / dequantize pairs, and every quantized weight by integers.

    Batch norm trained with fake-quantized weights is folded here, onto the very integers that training used. Works for
    graphs prepared by :func:`quantflow.prepare` and, for PTQ, by stock ``prepare_pt2e``.

    Args:
        graph: A calibrated or trained graph. It is left as it was and can train on.

    Returns:
        The quantized graph, for inference: export it again to lower it.

    Raises:
        QuantflowError: at stage ``"convert"``, when the graph is not prepared or an observed tensor is written in place and
            read elsewhere; at ``"calibrate"``, naming the nodes, where an observer saw no data or a range is not finite.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(4, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> graph = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> converted = qf.convert(qf.calibrate(graph, [x], progress=False))
        >>> [(name, tensor.dtype) for name, tensor in converted.named_buffers() if name.endswith("quantized")]
        [('0.weight_quantized', torch.int8)]
    """
    if not isinstance(graph, GraphModule) or not observers_of(graph):
        raise QuantflowError(
            "convert", "the graph was not prepared", node="graph", remedy="call qf.prepare(graph, quantizer) first"
        )
    converted = adopt(graph).eval()
    fold_constants(converted)
    check_observed(converted)
    check_observed_writes(converted)
    _erase_inference_identities(converted)
    with torch.no_grad():
        limit_resolution(converted, {pair.layer: pair for pair in normed_layers(converted.graph)})
        _convert_constants(converted)
        fold_batch_norm(converted)  # for the layers that stay in float
        separate_biases(converted)
        for node in list(converted.graph.nodes):
            observer = observer_of(node, converted)
            if observer is not None:
                _write_activation(converted, node, observer)
        round_biases(converted)
    drop_dead_code(converted.graph)
    drop_unused(converted)
    converted.graph.lint()
    converted.recompile()
    return converted


def check_observed(module: GraphModule) -> None:
    """Raise a :class:`QuantflowError` at stage ``"calibrate"`` that names the nodes whose observers have no range."""
    unseen: list[Node] = []
    broken: list[Node] = []
    for node in module.graph.nodes:
        observer = observer_of(node, module)
        if observer is not None and not is_constant(node.args[0]) and not has_seen_data(observer):
            (broken if saw_no_number(observer) else unseen).append(node.args[0])
    if broken:
        raise QuantflowError(
            "calibrate",
            "the range is infinite or not a number",
            node=label(broken[0]),
            remedy="look for NaN and infinity in the data, and in the float model's own values there",
        )
    if unseen:
        names = ", ".join(label(n) for n in unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
        raise QuantflowError(
            "calibrate",
            f"{len(unseen)} observers saw no data",
            node=names,
            remedy="run qf.calibrate(graph, data) or qf.train(graph, data) before qf.convert",
        )


def _erase_inference_identities(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if op(node) in INFERENCE_IDENTITIES and not _on_in_inference(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _on_in_inference(node: Node) -> bool:
    return has_argument(node, "train") and bool(argument(node, "train"))


def _convert_constants(module: GraphModule) -> None:
    """Write every observed constant as integers, and fold the batch norm of its layer."""
    norms = {pair.layer: pair for pair in normed_layers(module.graph)}
    _separate_by_norm(module, norms)
    # All constants are computed before any is written: fitting a bias reads the observer of the layer's input.
    found: list[tuple[Node, nn.Module, IntegerTensor, list[NormedLayer]]] = []
    for node in module.graph.nodes:
        observer = _constant_observer(module, node)
        if observer is None:
            continue
        pairs = [norms[user] for user in node.users if user in norms and is_weight(node, user)]
        found.append((node, observer, integer_constant(module, node, observer, pairs[0] if pairs else None), pairs))
    reads = reads_of(module.graph)
    for node, observer, constant, pairs in found:
        _write_constant(module, node, observer, constant)
        for pair in pairs:
            fold_into_bias(module, pair, reads)


def _constant_observer(module: GraphModule, node: Node) -> nn.Module | None:
    """The observer that ``node`` calls on a constant to quantize; None if there is none."""
    if node.op != "call_module" or not is_constant(node.args[0]):
        return None
    called = module.get_submodule(str(node.target))
    observer = called.fake_quantize if isinstance(called, BatchNormScaledFakeQuantize) else called
    if not is_observer(observer) or getattr(observer, "is_dynamic", False) or hasattr(observer, "convert"):
        return None
    return observer


def _separate_by_norm(module: GraphModule, norms: dict[Node, NormedLayer]) -> None:
    """Duplicate the observer call of a shared weight, so that each batch norm is folded into its own copy."""
    for node in list(module.graph.nodes):
        if _constant_observer(module, node) is None:
            continue
        calls: dict[tuple, Node] = {}
        for user in list(node.users):
            key = norms[user].statistics if user in norms and is_weight(node, user) else ()
            if not calls:
                calls[key] = node
            elif key not in calls:
                with module.graph.inserting_after(node):
                    calls[key] = module.graph.node_copy(node)
            if calls[key] is not node:
                user.replace_input_with(node, calls[key])


def _write_constant(module: GraphModule, node: Node, observer: nn.Module, constant: IntegerTensor) -> None:
    """Replace the observed constant by integers and, for each user, a dequantize."""
    grid = affine(observer)
    dtype = _storage_dtype(grid)
    base = str(node_argument(node).target)
    limits = (grid.quant_min, grid.quant_max, dtype)
    integers = unused_name(module, f"{base}_quantized")
    set_tensor(module, integers, constant.integers.to(dtype), parameter=False)
    per_channel = constant.scale.ndim > 0
    if per_channel:
        names = _add_qparams(module, base, constant.scale, constant.zero_point)
    for user in list(node.users):
        read = read_attribute(module, integers, user, node)
        if per_channel:
            qparams = (*(read_attribute(module, n, user, node) for n in names), constant.axis)
            target = decomposed.dequantize_per_channel.default
        else:
            qparams = (float(constant.scale), int(constant.zero_point))
            target = decomposed.dequantize_per_tensor.default
        user.replace_input_with(node, _call(module, user, target, (read, *qparams, *limits), like=node))
    module.graph.erase_node(node)


def _add_qparams(module: GraphModule, base: str, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[str, str]:
    names = unused_name(module, f"{base}_scale"), unused_name(module, f"{base}_zero_point")
    set_tensor(module, names[0], scale, parameter=False)
    set_tensor(module, names[1], zero_point.to(torch.int64), parameter=False)
    return names


def _write_activation(module: GraphModule, node: Node, observer: nn.Module) -> None:
    """Replace the observer call ``node`` by quantize and, for each user, dequantize."""
    if hasattr(observer, "convert"):  # the observer writes its own operators, as torchao's affine observers do
        cast(Any, observer).convert(module, node)
        return
    x, grid = node_argument(node), affine(observer)
    if getattr(observer, "dtype", torch.float32).is_floating_point:  # a placeholder observer
        node.replace_all_uses_with(x)
        module.graph.erase_node(node)
        return
    limits = (grid.quant_min, grid.quant_max, _storage_dtype(grid))
    qparams: tuple
    made: tuple = ()  # further arguments of dequantize
    if is_per_token(observer, node.users):
        quantize_op, dequantize_op = decomposed.quantize_per_token.default, decomposed.dequantize_per_token.default
        choose = decomposed.choose_qparams_per_token_asymmetric.default
        qparams = _choose_at_run_time(module, node, choose, (limits[2],))
        made = (node.meta["val"].dtype if value(node) is not None else torch.float32,)
    elif getattr(observer, "is_dynamic", False):
        quantize_op, dequantize_op = decomposed.quantize_per_tensor.tensor, decomposed.dequantize_per_tensor.tensor
        symmetric = observer.qscheme in SYMMETRIC
        choose = (decomposed.choose_qparams_symmetric if symmetric else decomposed.choose_qparams).tensor
        eps = getattr(observer, "eps", SMALLEST_SCALE)
        qparams = _choose_at_run_time(module, node, choose, (*limits[:2], eps, limits[2]))
    elif grid.qscheme in PER_CHANNEL:
        quantize_op, dequantize_op = decomposed.quantize_per_channel.default, decomposed.dequantize_per_channel.default
        names = _add_qparams(module, f"{node.name}_activation", *qparams_of(observer))
        qparams = (*(read_attribute(module, n, node, node) for n in names), int(grid.ch_axis))
    else:
        quantize_op, dequantize_op = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
        scale, zero_point = qparams_of(observer)
        qparams = (float(scale), int(zero_point))
        x = _before_saturation(x, node, *qparams, *limits[:2])
    quantized = _call(module, node, quantize_op, (x, *qparams, *limits), like=node)
    for user in list(node.users):
        dequantized = _call(module, user, dequantize_op, (quantized, *qparams, *limits, *made), like=node)
        user.replace_input_with(node, dequantized)
    clamp = node_argument(node)
    module.graph.erase_node(node)
    if clamp is not x:  # an in-place clamp is not removed by dead code elimination
        module.graph.erase_node(clamp)


def _before_saturation(x: Node, reader: Node, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Node:
    """The input of a clamp before quantize, if the integer range saturates at the same values; else ``x``."""
    limits = clamp_limits(x)
    if limits is None or only_user(x) is not reader or writes_for_others(x):
        return x
    low, high = ((q - zero_point) * scale for q in (quant_min, quant_max))
    # Values within half a step outside the integer range round into it.
    return node_argument(x) if limits[0] <= low + scale / 2 and limits[1] >= high - scale / 2 else x


def _choose_at_run_time(module: GraphModule, node: Node, choose: Callable, settings: tuple) -> tuple[Node, Node]:
    """The nodes that compute scale and zero point of the dynamically quantized tensor that ``node`` observes."""
    chosen = _call(module, node, choose, (node.args[0], *settings), like=node)
    with module.graph.inserting_before(node):
        scale, zero_point = (module.graph.call_function(operator.getitem, (chosen, i)) for i in range(2))
    return scale, zero_point


def _storage_dtype(observer: AffineObserver) -> torch.dtype:
    return _STORAGE.get(observer.dtype, observer.dtype)


def _call(module: GraphModule, before: Node, target: Callable, args: tuple, *, like: Node) -> Node:
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args)
    node.meta = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
    if "val" in like.meta and value(like) is not None:
        node.meta["val"] = like.meta["val"]
    return node
