"""The whole flow on one network, for tests: quantized on its example, and lowered to XNNPACK."""

import quantflow as qf
from quantizers import XNNPACKQuantizer


def quantize(model, *x, qat=False):
    graph = qf.export(model.eval(), x).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
    for batch in [x]:
        qf.calibrate(prepared, [batch], progress=False)
    return qf.convert(prepared)


def lower(converted, *x):
    return qf.export(converted, x).to_core_aten().to_edge("xnnpack").to_executorch()
