"""The reference: the float network that a quantized one is compared with, its values and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from quantflow.conversion.convert import convert
from quantflow.errors import QuantflowError
from quantflow.graph.batch_norm import norm_as_convolution
from quantflow.graph.folding import fold_for_inference
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.half_precision import compute_in_float32
from quantflow.observers.observation import is_converted, observers_of
from quantflow.simulation.interpreter import Interpreter, Values, float_tensors
from quantflow.simulation.output_gradients import random_signs


def reference_graph(graph: object, stage: str) -> TrainableGraphModule:
    """A copy of the float ``graph`` with batch norm folded, as quantizing folds it, in inference mode.

    Raises:
        QuantflowError: at ``stage``, where it is no float graph.
    """
    if not isinstance(graph, GraphModule) or observers_of(graph) or is_converted(graph):
        kind = "a quantized graph" if isinstance(graph, GraphModule) else type(graph).__name__
        remedy = "pass qf.export(model, args).module(), as it was before qf.prepare"
        raise QuantflowError(stage, f"{kind} is no float graph", node="float_graph", remedy=remedy)
    copied = adopt(graph).eval()
    compute_in_float32(copied)
    fold_for_inference(copied)
    norm_as_convolution(copied)
    copied.recompile()
    return copied


def converted_form(graph: object, stage: str) -> GraphModule:
    """The converted form of the quantized ``graph``: itself if it is converted, else :func:`quantflow.convert` of it.

    Raises:
        QuantflowError: at ``stage``, where it is neither prepared nor converted.
    """
    if isinstance(graph, GraphModule) and is_converted(graph):
        return graph
    if not isinstance(graph, GraphModule) or not observers_of(graph):
        remedy = "pass a graph that qf.prepare and qf.calibrate, or qf.convert, returned"
        raise QuantflowError(stage, "no quantized graph", node="quantized_graph", remedy=remedy)
    return convert(graph)


def reference_values(graph: GraphModule, flat: Sequence[object]) -> tuple[Values, Values, list[torch.Tensor]]:
    """Of one batch of flat inputs: the value of every node, a gradient for each float tensor, and the float outputs.

    The gradient is that of the outputs, each in units of its own root mean square, summed with random signs: the expectation of
    ``(gradient · error)²`` is the error's power at the outputs, to first order (Hutchinson's estimator). There are no
    gradients where an operator has none.
    """
    values, returned_floats = Values(), list[torch.Tensor]()
    with torch.enable_grad():
        for node, _ in Interpreter(graph, gradients=True).run(flat, values=values, keep=True):
            if node.op == "output":
                returned_floats = float_tensors(values[node])
            elif node.op != "get_attr" and isinstance(values[node], torch.Tensor) and values[node].requires_grad:
                # A new tensor: an operator that returns its input would give two nodes one gradient.
                values[node] = values[node].view_as(values[node])
        moved = [y for y in returned_floats if y.requires_grad]
        wanted = {n: v for n, v in values.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        random = torch.Generator().manual_seed(0)
        signs = [random_signs(y, random) for y in moved]
        try:
            found = torch.autograd.grad(moved, list(wanted.values()), signs, allow_unused=True) if moved else ()
        except RuntimeError:  # an operator without a gradient
            found = ()
    gradients: Values = {n: g for n, g in zip(wanted, found, strict=False) if g is not None}
    plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    return plain, gradients, [y.detach() for y in returned_floats]
