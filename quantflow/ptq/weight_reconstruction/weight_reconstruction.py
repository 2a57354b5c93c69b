"""Weight reconstruction: weights and biases with which a layer's quantized output is closest to its float output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from quantflow.data.sample import Inputs
from quantflow.graph.aten import node_argument
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import tensor_of
from quantflow.ptq.weight_reconstruction.least_squares import correction
from quantflow.ptq.weight_reconstruction.moments import Moments
from quantflow.ptq.weight_reconstruction.rounding import round_fitted
from quantflow.ptq.writing import add_to_bias, write_weight
from quantflow.simulation.output_gradients import OutputGradients, row_weights
from quantflow.simulation.paired_interpreter import LayerPair, run_paired
from quantflow.simulation.quantized_layers import quantized_layers


@torch.no_grad()
def reconstruct_weights(
    graph: GraphModule, sample: Sequence[Inputs], gradients: OutputGradients | None = None, *, progress: bool = True
) -> TrainableGraphModule:
    """Return a copy of ``graph`` whose layers reproduce their float outputs from quantized inputs, with quantized weights.

    The float network and the integer network run side by side, layer by layer. Each layer's weight is fitted by ridge
    regression to its float output, given the inputs as the integer network has them (not where an output reads one channel,
    as in depthwise convolutions), and rounded by GPTQ (Frantar et al. 2023, arXiv:2210.17323) and coordinate descent (Behdin
    et al. 2023, arXiv:2309.01885), with few levels on the scale of least error; its bias takes the remaining mean error (Nagel
    et al. 2019, arXiv:1906.04721, section 4.2). Rows are weighted by how much the network's output depends on them. (Fitting to
    quantized inputs: Nagel et al. 2020, AdaRound, arXiv:2004.10568, section 3.5; Zhang et al. 2025, Qronos, arXiv:2505.11695.)

    Args:
        graph: A prepared and calibrated graph; it is left as it was.
        sample: Batches of flat inputs, as ``Sample.batches()`` returns them, two or more; of one, weights are rounded but not
            fitted.
        gradients: What :func:`quantflow.ptq.output_gradients` found on the same sample; without, all rows have equal weight.
        progress: Show a progress bar.

    Returns:
        The copy, in inference mode.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import reconstruct_weights
        >>> from quantizers import W4A8, XNNPACKQuantizer
        >>> model, sample = torch.nn.Linear(8, 4).eval(), qf.Sample()
        >>> graph = qf.export(model, (torch.randn(1, 8),), dynamic_batch=True).module()
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer(W4A8))
        >>> _ = qf.calibrate(prepared, [torch.randn(64, 8)], sample=sample, progress=False)
        >>> torch.equal(reconstruct_weights(prepared, sample.batches(), progress=False).weight, prepared.weight)
        False
    """
    graph = adopt(graph).eval()
    rows = {} if gradients is None else {node.name: found for node, found in gradients.rows.items()}
    for pair in run_paired(graph, sample, quantized_layers(graph), title="reconstruct_weights", progress=progress):
        _fit(graph, pair, rows.get(pair.layer.node.name))
    graph.recompile()
    return graph


def _fit(graph: GraphModule, pair: LayerPair, gradients: list[torch.Tensor] | None) -> None:
    """Fit the weight and the bias of the layer at ``pair``."""
    layer = pair.layer
    weight = tensor_of(graph, node_argument(layer.weight)).detach()
    matrices = layer.matrices(weight)
    halves: list[Moments | None] = [None, None]
    shift: torch.Tensor | None = None
    for batch, (reference, values) in enumerate(zip(pair.floats, pair.integers, strict=True)):
        y = reference[layer.node]
        index = layer.draw(y, batch)
        x = layer.inputs(values[layer.source], y, index)
        bias = 0.0 if layer.bias is None else values[layer.bias].reshape(layer.groups, 1, -1)
        residual = layer.outputs(y, index) - x @ matrices.transpose(1, 2) - bias
        shift = x.mean(1, keepdim=True) if shift is None else shift
        moments = Moments.of(x, residual, row_weights(gradients, batch, x.shape[:2], x), shift)
        half = halves[batch % 2]
        halves[batch % 2] = moments if half is None else half + moments
    first, second = halves
    assert first is not None
    whole = first if second is None else first + second
    if not all(t.isfinite().all() for t in (whole.xx, whole.xr)):
        return
    fitted = matrices.double()
    # One channel can't tell an error from a signal: its fit would only shrink.
    if second is not None and layer.channels > 1:
        fitted = fitted + correction(first, second)
    rounded, qparams = round_fitted(layer, fitted, whole.covariance, weight)
    change = rounded - matrices
    bias = whole.mean_r - whole.mean_x @ change.transpose(1, 2)
    write_weight(graph, layer, rounded, qparams)
    add_to_bias(graph, layer, bias)
