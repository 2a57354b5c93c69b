"""Output gradients: what an error in each layer does to the outputs, behind token numbers too."""

import pytest
import torch
from networks import Text

import quantflow as qf
from quantizers import XNNPACKQuantizer

IDS = torch.randint(50, (8, 6))


def prepared(model, x):
    graph = qf.export(model.eval(), (x,), dynamic_batch=True).module()
    return graph, qf.prepare(graph, XNNPACKQuantizer())


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
def test_effects_are_known_behind_token_numbers():
    graph, text = prepared(Text(), IDS)
    found = qf.diagnose(graph, qf.calibrate(text, [IDS], progress=False), [IDS], progress=False)
    effects = {layer.layer: layer.effect for layer in found.layers}
    assert effects["hidden"] is not None
    assert effects["head"] is not None
    recovered = qf.recover(text, [IDS], progress=False)
    assert any("range optimization" in step.name for step in recovered.steps)
