"""Features are what a layer gave; what is validated and converted has no taps."""

import pytest
import torch
from networks import ConvNet, WritesAPart
from training_data import X, graph, loader

import quantflow as qf
from quantflow.training.features import recorded_features
from quantizers import XNNPACKQuantizer


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_is_validated_and_converted_has_no_taps(ema):
    """A layer whose output is recorded_features is folded with its batch norm all the same."""
    teacher = graph(qat=False).eval()
    student = qf.calibrate(qf.prepare(teacher, XNNPACKQuantizer(), qat=True), [X], progress=False)
    convolutions = {n.args[0].name for n in student.graph.nodes if n.target is torch.ops.aten.batch_norm.default}
    (layer, *_) = [name for name, m in ConvNet().named_modules() if isinstance(m, torch.nn.Conv2d)]
    seen = []
    options = {"validate": lambda g: seen.append(g.code) or 0.0, "validate_converted": True, "ema": ema}
    qf.train(student, loader(), distill=qf.Distillation(teacher, features=(layer,)), **options, progress=False)
    assert convolutions
    assert len(seen) == 3  # before the first step, after the epoch, converted
    assert not any("recorders" in code for code in seen)
    assert "batch_norm" not in seen[2]


def test_a_feature_is_what_the_layer_gave_before_a_part_of_it_was_written():
    tokens, x, model = torch.arange(8), torch.randn(8, 4), WritesAPart().eval()
    captured = qf.export(model, (tokens, x)).module()
    with recorded_features(captured, ["embedding"]) as (recorder,), torch.no_grad():
        captured(tokens, x)
        assert torch.equal(recorder.take(), model.embedding(tokens))


@pytest.mark.parametrize(("teacher", "words"), [(ConvNet(), "no nodes to recorder"), (None, "no layer 'nowhere'")])
def test_features_that_are_not_there(teacher, words):
    student = graph()
    distill = qf.Distillation(teacher or graph(qat=False), features=("head",) if teacher else ("nowhere",))
    with pytest.raises(qf.QuantflowError, match=words):
        qf.train(student, loader(), distill=distill, progress=False)
    assert "recorders" not in student.code
