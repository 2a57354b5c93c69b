"""What a first try meets: messages that help, and gradients behind token numbers."""

import pytest
import torch
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.hidden(self.embedding(ids))).mean(1))


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
    assert any("ranges" in step.name for step in recovered.steps)


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
def test_a_batch_that_the_graph_does_not_run_on_is_named():
    _, text = prepared(Text(), IDS)
    with pytest.raises(qf.QuantflowError, match="does not run") as raised:
        qf.calibrate(text, [IDS, IDS + 50], progress=False)
    assert (raised.value.stage, raised.value.node) == ("calibrate", "batch 1")


def test_outputs_of_which_integers_keep_nothing_are_named():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-6
    _, graph = prepared(model, x)
    sample = qf.Sample()
    qf.calibrate(graph, [x], sample=sample, progress=False)
    with pytest.warns(qf.QuantflowWarning, match="keep nothing of the outputs"):
        qf.recover(graph, sample, progress=False)


def test_a_batch_size_for_the_program_is_no_yes_or_no():
    with pytest.raises(qf.QuantflowError, match="yes or no"):
        qf.quantize(nn.Linear(4, 4), (torch.randn(2, 4),), [torch.randn(2, 4)], dynamic_batch=8, progress=False)


def test_a_dimension_that_varies_from_an_example_of_one():
    shapes = {"input": {0: torch.export.Dim("b", min=1, max=8)}}
    with pytest.raises(qf.QuantflowError) as raised:
        qf.export(nn.Sequential(nn.Linear(4, 4)), (torch.randn(1, 4),), dynamic_shapes=shapes)
    assert "two or more" in raised.value.remedy
