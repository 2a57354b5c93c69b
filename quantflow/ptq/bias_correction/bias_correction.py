"""Bias correction: subtracts the mean quantization error of each output of a layer from its bias."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch.fx import GraphModule, Node

from quantflow.data.batches import PickInputs
from quantflow.data.sample import Inputs, Sample
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import label, node_argument
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.ptq.bias_correction.data_free_statistics import expected_statistics
from quantflow.ptq.channel_ranges import rows_of_channels
from quantflow.ptq.writing import add_to_bias
from quantflow.simulation.fake_quantized import fake_quantized
from quantflow.simulation.float_weights import attribute, float_weight
from quantflow.simulation.interpreter import evaluate
from quantflow.simulation.paired_interpreter import LayerPair, run_paired
from quantflow.simulation.preconditions import check_calibrated, draw
from quantflow.simulation.quantized_layers import Layer, quantized_layers

_STAGE = "correct_bias"


@torch.no_grad()
def correct_bias(
    graph: GraphModule,
    data: Sample | Iterable[object] | None = None,
    *,
    inputs: PickInputs | None = None,
    progress: bool = True,
) -> TrainableGraphModule:
    """Return a copy of ``graph`` with biases such that each layer has the same mean output as in float.

    With ``data`` the correction is empirical: the float and the integer network run side by side, and each layer is corrected
    after those before it. Without data it is analytic: a weight's rounding error times the mean of its input, which follows
    from the batch norm folded into the layer before, through relu and relu6 as a clipped normal. (Nagel et al. 2019,
    arXiv:1906.04721, section 4.2 and appendices B to D.)

    It hurts where the mean error comes from a few outliers that saturate: it then shifts all values of the channel. It also
    hurts where the mean differs from that of the later data: few or unlike examples or, in the analytic form, statistics that
    no longer hold (weights changed after training, a norm whose inputs are far from normal). The analytic form corrects errors
    of weights only, not the rounding of activations.

    Args:
        graph: A prepared and calibrated graph; it is left as it was.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used. None for the
            analytic form.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        progress: Show a progress bar.

    Returns:
        The copy.

    Raises:
        QuantflowError: at stage ``"correct_bias"``, when the graph is not prepared for PTQ or not calibrated, a batch does not
            fit it, or without data nothing is known of any layer's inputs.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import correct_bias
        >>> from quantizers import W4A8, XNNPACKQuantizer
        >>> model, data = torch.nn.Linear(8, 4).eval(), [torch.rand(64, 8)]
        >>> graph = qf.export(model, (data[0],), dynamic_batch=True).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(W4A8)), data, progress=False)
        >>> corrected = correct_bias(prepared, data, progress=False)
        >>> torch.equal(corrected.weight, prepared.weight), torch.equal(corrected.bias, prepared.bias)
        (True, False)
    """
    check_calibrated(graph, _STAGE)
    corrected = adopt(graph)
    training = corrected.training  # a graph that stock torchao prepared says True in inference mode
    corrected.eval()
    layers = quantized_layers(corrected, solvable=False)
    if data is None:
        _from_norms(corrected, layers)
    else:
        sample = draw(corrected, data, stage=_STAGE, inputs=inputs)
        _from_data(corrected, layers, sample, progress)
    corrected.recompile()
    return corrected.train(training)


def _from_data(graph: GraphModule, layers: dict[Node, Layer], sample: Sequence[Inputs], progress: bool) -> None:
    for pair in run_paired(graph, sample, layers, title="correct bias", progress=progress):
        shift = _mean_error(pair)
        if shift.isfinite().all():
            add_to_bias(graph, pair.layer, shift)


def _mean_error(pair: LayerPair) -> torch.Tensor:
    """The float output less the integer one, the mean of each channel, float64."""
    total: torch.Tensor | float = 0.0
    count = 0
    for reference, values in zip(pair.floats, pair.integers, strict=True):
        error = reference[pair.layer.node] - evaluate(pair.layer.node, values)
        by_channel = rows_of_channels(error, pair.layer.channel_axis)
        total = total + by_channel.double().sum(0)
        count += len(by_channel)
    return cast(torch.Tensor, total) / count


def _from_norms(graph: GraphModule, layers: dict[Node, Layer]) -> None:
    known, unknown = expected_statistics(graph), []
    for node, layer in layers.items():
        read = node_argument(layer.weight)
        weight: torch.Tensor = attribute(graph, read)
        expected = known.get(layer.source)
        features = weight.shape[1] * layer.groups
        if (
            expected is None
            or len(expected.mean) != features
            or (layer.channel_axis == -1 and node.meta["val"].ndim != 2)
        ):
            unknown.append(label(node))
            continue
        error = fake_quantized(graph.get_submodule(str(layer.weight.target)), weight) - float_weight(read, weight)
        mean = expected.mean.to(weight.device).reshape(layer.groups, -1).repeat_interleave(math.prod(layer.kernel), 1)
        moved = 0.0
        if layer.bias is not None:  # the change by an earlier algorithm
            bias = attribute(graph, layer.bias)
            moved = (bias - float_weight(layer.bias, bias)).reshape(layer.groups, -1, 1)
        add_to_bias(graph, layer, -(layer.matrices(error).double() @ mean[..., None] + moved))
    if len(unknown) == len(layers):
        reason = "no batch norm was folded that would tell the mean of a layer's input"
        raise QuantflowError(
            _STAGE, reason, node="data", remedy="pass data; or prepare the graph by qf.prepare, which folds"
        )
    if unknown:
        reason = "nothing tells the mean of their inputs: these layers keep their bias"
        warnings.warn(QuantflowWarning(_STAGE, reason, node=", ".join(unknown), remedy="pass data"), stacklevel=3)
