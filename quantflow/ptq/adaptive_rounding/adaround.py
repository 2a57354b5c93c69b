"""AdaRound: learns for each weight whether to round it up or down."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from quantflow.data.batches import PickInputs
from quantflow.data.sample import Sample
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import label
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.ptq.adaptive_rounding.block import round_block
from quantflow.ptq.adaptive_rounding.block_reconstruction import NoReconstructionError
from quantflow.ptq.adaptive_rounding.blocks import blocks
from quantflow.ptq.adaptive_rounding.layer import round_layer
from quantflow.simulation.output_gradients import OutputGradients
from quantflow.simulation.paired_interpreter import run_paired
from quantflow.simulation.preconditions import check_calibrated, draw
from quantflow.simulation.quantized_layers import quantized_layers

_STAGE = "adaround"
_STAY = "the weights of these layers stay as they are"
_NOTHING = f"too wide, in groups, quantized exactly already or not finite: {_STAY}"
_WORSE = f"no rounding was found that reduces their block's error, also on held-out examples: {_STAY}"
_REMEDIES = {
    _NOTHING: "nothing to do where that is meant; call adaround before reconstruct_weights",
    _WORSE: "more examples, more iterations, or fewer layers together",
}


@torch.no_grad()
def adaround(
    graph: GraphModule,
    data: Sample | Iterable[object],
    gradients: OutputGradients | None = None,
    *,
    together: int = 1,
    iterations: int = 500,
    inputs: PickInputs | None = None,
    progress: bool = True,
) -> TrainableGraphModule:
    """Return a copy of ``graph`` with each weight rounded up or down, whichever is better for the layer's output.

    The layers are rounded in order. Which of the two integers around a weight to take is learned by gradient descent, so that
    the layer reproduces its float output, after its relu or relu6, from its quantized inputs (Nagel et al. 2020, AdaRound,
    arXiv:2004.10568). Scales and zero points do not change. An output channel keeps nearest rounding where that has the smaller
    error on all of the data, or on the quarter of it that is held out.

    With ``together`` the layers of a block are learned at once, so that the block reproduces its float outputs (Li et
    al. 2021, BRECQ, arXiv:2102.05426): errors of its layers may cancel. A block ends where a single activation
    carries everything that quantization changes, which is never inside a residual block. A block keeps its weights where that
    has the smaller error at one of its outputs, on all of the data or on the held-out quarter. A block of one layer, and one
    that is too large for memory or has no gradient, is learned layer by layer.

    It pays with few bits (4). It hurts where examples are few for the features of a layer, and, without ``gradients``,
    where a network has outliers that do not matter to it: these are then what is fitted. A weight that is quantized exactly
    already, as after :func:`reconstruct_weights`, has nothing to learn: call this first. Time grows with ``iterations``.

    Args:
        graph: A prepared and calibrated graph; it is left as it was.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used.
        gradients: What :func:`quantflow.ptq.output_gradients` found on the batches of that sample: rows are weighted by
            how much the network's output depends on them. Without, all have equal weight. At the output of a block they are
            known where only clamps and sums follow its last layer; elsewhere all rows have equal weight.
        together: The least number of layers to learn at once; 1 is layer by layer.
        iterations: Steps of Adam for each layer or block.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        progress: Show a progress bar.

    Returns:
        The copy. A warning names the layers and blocks that keep their weights.

    Raises:
        QuantflowError: at stage ``"adaround"``, when the graph is not prepared for PTQ or not calibrated, a batch does not fit
            it, or ``iterations`` or ``together`` is not positive.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import adaround
        >>> from quantizers import W4A8, XNNPACKQuantizer
        >>> model, data = torch.nn.Linear(8, 4).eval(), [torch.randn(64, 8)]
        >>> graph = qf.export(model, (data[0],), dynamic_batch=True).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(W4A8)), data, progress=False)
        >>> rounded = adaround(prepared, data, iterations=100, progress=False)
        >>> torch.equal(rounded.weight, prepared.weight)
        False
    """
    check_calibrated(graph, _STAGE)
    if iterations < 1:
        raise QuantflowError(_STAGE, f"{iterations} steps learn nothing", node="iterations", remedy="500, say")
    if together < 1:
        remedy = "1 for layer by layer, 2 or more for blocks"
        raise QuantflowError(_STAGE, f"{together} layers at once learn nothing", node="together", remedy=remedy)
    rounded = adopt(graph)
    training = rounded.training  # a graph that stock torchao prepared says True in inference mode
    rounded.eval()
    sample = draw(rounded, data, stage=_STAGE, inputs=inputs)
    row_gradients = {} if gradients is None else {node.name: found for node, found in gradients.rows.items()}
    layers = quantized_layers(rounded)
    found = blocks(rounded, layers, together) if together > 1 else []
    whole = {block.layers[0]: block for block in found if len(block.layers) > 1}
    done: set[Node] = set()
    notes: dict[str, list[Node]] = defaultdict(list)
    notes[_NOTHING] += [node for node in quantized_layers(rounded, solvable=False) if node not in layers]
    for pair in run_paired(rounded, sample, layers, title="adaround", progress=progress):
        node = pair.layer.node
        if (block := whole.get(node)) is not None:
            try:
                fixed, worse = round_block(rounded, block, pair, layers, row_gradients, iterations)
            except NoReconstructionError as error:
                notes[f"no block, as {error}: these layers are learned one by one"] += block.layers
            else:
                notes[_NOTHING] += fixed
                notes[_WORSE] += worse
                done.update(block.layers)
        if node not in done and not round_layer(rounded, pair, row_gradients.get(node.name), iterations):
            notes[_NOTHING].append(node)
    for reason, nodes in notes.items():
        if nodes:
            remedy = _REMEDIES.get(
                reason, "nothing to do where that is meant; else more examples, or fewer layers together"
            )
            names = ", ".join(label(node) for node in nodes)
            warnings.warn(QuantflowWarning(_STAGE, reason, node=names, remedy=remedy), stacklevel=2)
    rounded.recompile()
    return rounded.train(training)
