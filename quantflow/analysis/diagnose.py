"""``diagnose``: compares a quantized network with its float network, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch.fx import GraphModule
from tqdm import tqdm

from quantflow.analysis.diagnosis import Diagnosis
from quantflow.analysis.layer_comparison import LayerComparison
from quantflow.analysis.reference import converted_form, reference_graph
from quantflow.data.batches import PickInputs, batches, count_of
from quantflow.graph.parameters import device_of
from quantflow.signature.signature import Signature
from quantflow.simulation.stateful_calls import stateful_calls


def diagnose(
    float_graph: GraphModule,
    quantized_graph: GraphModule,
    data: Iterable[object],
    *,
    inputs: PickInputs | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Compare a quantized network with its float network, layer by layer.

    Each layer is computed from the float network's inputs, with its own quantized weights and its own scale and zero point:
    this gives the error that it adds. That error is compared with the one that the same layer has with the same bits and
    granularity over the extremes of the very same values: the error that it must have. Errors count where the outputs depend
    on them (by the gradient of the float network), so that a range kept to the part that matters is no fault.

    Memory does not grow with the number of batches: it is that of one batch through both networks.

    Args:
        float_graph: What ``Exported.module()`` returned, before :func:`quantflow.prepare`.
        quantized_graph: The same network prepared and calibrated (or trained), or converted, also by stock torchao where it
            kept nodes or layers by name.
        data: Batches, as for :func:`quantflow.calibrate`; targets are not used.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        max_batches: The most batches to run; None for all.
        progress: Show a progress bar.

    Returns:
        The errors of each layer; ``print`` shows them as a table.

    Raises:
        QuantflowError: at stage ``"diagnose"``, when the one is no float graph, the other no quantized graph or one of another
            network, there is no data, or a batch does not fit.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
        >>> graph = qf.export(model.eval(), (x,)).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
        >>> diagnosis = qf.diagnose(graph, prepared, [x], progress=False)
        >>> sorted(errors.node for errors in diagnosis.layers)
        ['conv2d', 'flatten', 'input_1', 'linear']
    """
    reference = reference_graph(float_graph, "diagnose")
    converted = converted_form(quantized_graph, "diagnose")
    comparison = LayerComparison(reference, converted)
    total = count_of(data, max_batches, stage="diagnose")
    device = device_of(reference)
    feed = itertools.islice(batches(data, float_graph, stage="diagnose", inputs=inputs, device=device), max_batches)
    signature = Signature.of_graph(float_graph)
    calls = stateful_calls(reference, feed, signature, stage="diagnose")
    for flat in tqdm(calls, desc="diagnose", total=total, unit="batch", disable=not progress, leave=False):
        comparison.add(flat)
    return comparison.diagnosis()
