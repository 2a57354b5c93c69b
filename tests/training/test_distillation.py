"""Distillation pulls towards the teacher, by its outputs and by its features."""

import pytest
import torch
from training_data import X, graph, loader

import quantflow as qf
from quantflow.training.features import recorded_features
from quantizers import XNNPACKQuantizer


def test_distillation_pulls_towards_the_teacher():
    teacher = graph(qat=False).eval()
    student = qf.prepare(teacher, XNNPACKQuantizer(), qat=True)
    with torch.no_grad():
        student.head.weight.add_(torch.randn_like(student.head.weight))

    def gap():
        # Of probabilities: the shift of all logits of an image is nobody's to learn.
        return float((student.eval()(X).softmax(1) - teacher(X).softmax(1)).square().mean())

    qf.calibrate(student, [X], progress=False)
    before = gap()
    distill = qf.Distillation(teacher, weight=1.0, temperature=2.0)
    qf.train(student, loader(), epochs=12, lr=0.03, distill=distill, progress=False)
    assert gap() < 0.5 * before


def test_a_teacher_alone_needs_no_targets():
    teacher = graph(qat=False).eval()
    losses = []
    for data in (loader(), [x for x, _ in loader()]):
        student = qf.calibrate(qf.prepare(teacher, XNNPACKQuantizer(), qat=True), [X], progress=False)
        given = {"distill": qf.Distillation(teacher, weight=1.0), "loss": lambda output, target: 1 / 0}
        losses.append(qf.train(student, data, lr=0.01, **given, progress=False).loss)
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(qf.QuantflowError, match="no target"):
        qf.train(student, [x for x, _ in loader()], distill=qf.Distillation(teacher), progress=False)


def test_features_are_drawn_to_the_teachers():
    teacher = graph(qat=False).eval()
    student = qf.calibrate(qf.prepare(teacher, XNNPACKQuantizer(), qat=True), [X], progress=False)
    with torch.no_grad():
        student.depthwise_bn.weight.mul_(0.5)
    codes = teacher.code, student.code
    layers = ("depthwise_bn", "head")  # what follows the first writes into its output

    def gap():
        with (
            recorded_features(student.eval(), layers) as ours,
            recorded_features(teacher, layers) as theirs,
            torch.no_grad(),
        ):
            student(X), teacher(X)
            return sum(float((a.take() - b.take()).square().mean()) for a, b in zip(ours, theirs, strict=True))

    before = gap()
    distill = qf.Distillation(teacher, weight=0.0, features=layers, feature_weight=5.0)
    # Without any target's pull, only the features teach.
    zero = lambda output, target: (output * 0).sum()  # noqa: E731
    options = {"loss": zero, "schedule": qf.Schedule(freeze_batch_norm=0.0), "ema": 0.5}
    qf.train(student, loader(), epochs=6, lr=0.03, distill=distill, **options, progress=False)
    assert gap() < 0.5 * before
    assert (teacher.code, student.code) == codes
    qf.convert(student)
