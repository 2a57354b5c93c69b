"""The layers of a prepared graph: what of each is quantized."""

import torch
from networks import ConvNet, randomize_statistics, sqnr
from torch import nn

import quantflow as qf
from quantflow.analysis.layers import layers_of, observers_in, still_quantized
from quantflow.simulation.network import outputs
from quantflow.simulation.partial import PartialNetwork
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer


def test_still_quantized_is_what_a_quantizer_with_overrides_quantizes():
    model, x = randomize_statistics(ConvNet()).eval(), torch.randn(4, 3, 16, 16)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    for floating in (["stem"], ["head"], ["stem", "depthwise"], ["add"], ["depthwise", "add"]):
        where = {name: (lambda node, name=name: node.name == name) if name == "add" else name for name in floating}
        skipped = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(skip=list(where.values()))), [x], progress=False)
        with torch.no_grad():
            ours = PartialNetwork(prepared, [x], still_quantized(prepared, floating)).returned
            (theirs,) = outputs(skipped, [(x,)], integers=True)
        names = [
            {str(n.args[0]) for n in calls} for calls in (still_quantized(prepared, floating), observers_in(skipped))
        ]
        assert names[0] == names[1]
        assert sqnr(theirs[0], ours[0]) > 40  # a rounding may fall the other way


def test_a_dynamic_input_is_charged_to_the_layer_that_reads_it():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    prepared = qf.prepare(qf.export(model, (torch.randn(3, 8),)).module(), XNNPACKQuantizer(DYNAMIC_INT8))
    found = {layer.name: len(layer.observers) for layer in layers_of(prepared)}
    assert found == {"0": 2, "2": 2}
