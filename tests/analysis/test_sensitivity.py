"""Sensitivity: the layer that breaks the network is named both ways."""

import pytest

import quantflow as qf
from quantizers import XNNPACKQuantizer


def test_sensitivity_names_the_planted_layer_both_ways(planted):
    model, x, _ = planted
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    found = qf.sensitivity(prepared, [x], progress=False)
    assert found.layers[0].layer == "planted"
    assert max(found.layers, key=lambda cost: cost.to_float).layer == "planted"
    assert found.layers[0].to_integers < 20 < found.layers[0].to_float
    assert all(cost.to_integers > 30 for cost in found.layers[1:])
    assert "planted" in str(found).splitlines()[1]
    assert '"planted"' in found.to_json()
    with pytest.raises(qf.QuantflowError, match="not prepared"):
        qf.sensitivity(graph, [x])
    with pytest.raises(qf.QuantflowError, match="not calibrated"):
        qf.sensitivity(qf.prepare(graph, XNNPACKQuantizer()), [x])
