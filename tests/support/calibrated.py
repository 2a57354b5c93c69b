"""A calibrated graph, and its error in integers, for tests of algorithms after training."""

import torch

import quantflow as qf
from quantflow.simulation.float_weights import with_float_weights
from quantflow.simulation.network import outputs
from quantizers import XNNPACKQuantizer


def calibrated(model, example, data, quantizer=None, dynamic_batch=True):
    graph = qf.export(model.eval(), example, dynamic_batch=dynamic_batch).module()
    prepared = qf.prepare(graph, quantizer or XNNPACKQuantizer())
    return qf.calibrate(prepared, data, progress=False)


def sqnr(graph, batches):
    """Of the integer network, beside the float network as it was before any algorithm, dB."""
    with torch.no_grad():
        floats = outputs(with_float_weights(graph), batches, integers=False)
        reference = torch.cat([o[0].flatten() for o in floats])
        found = torch.cat([o[0].flatten() for o in outputs(graph, batches, integers=True)])
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))
