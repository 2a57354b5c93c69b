"""The training loop: it learns, freezes on schedule, and says what is wrong."""

import pytest
import torch
from networks import ConvNet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantflow as qf
from quantizers import XNNPACKQuantizer

Y = torch.arange(32) % 5
X = torch.randn(32, 3, 16, 16) + torch.randn(5, 3, 1, 1)[Y]


def loader():
    return DataLoader(TensorDataset(X, Y), 8)


def graph(*, qat=True):
    captured = qf.export(ConvNet(p=0.0), (X[:2],), dynamic_batch=True).module()
    return qf.prepare(captured, XNNPACKQuantizer(), qat=True) if qat else captured


@pytest.mark.parametrize("qat", [False, True])
def test_learns(qat):
    trained = graph(qat=qat)
    seen = []
    history = qf.train(
        trained, loader(), epochs=8, lr=0.05, validate=lambda g: seen.append(g.training) or 0.5, progress=False
    )
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert history.metric == [0.5] * 8
    assert not any(seen)
    assert not trained.training


def test_freezes_on_schedule():
    trained = graph()
    states = []

    def look(_):
        states.append((trained.batch_norm_frozen, trained.quantization.hardtanh_.observer_enabled))
        return 0.0

    schedule = qf.Schedule(freeze_batch_norm=0.5, freeze_observers=0.75)
    qf.train(trained, loader(), epochs=4, schedule=schedule, validate=look, progress=False)
    assert states == [(False, True), (False, True), (True, True), (True, False)]
    assert not trained.batch_norm_frozen


def test_a_loop_of_ones_own_works():
    trained = graph().train()
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    first = last = None
    for _ in range(5):
        for x, y in loader():
            loss = nn.functional.cross_entropy(trained(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = first or loss.item()
            last = loss.item()
    assert last < first
    qf.convert(trained)


@pytest.mark.parametrize(
    ("data", "words"),
    [([], "empty"), ([X[:4]], "target"), ([(X[:4] * float("nan"), Y[:4])], "the loss is nan")],
)
def test_bad_data(data, words):
    with pytest.raises(qf.QuantflowError, match=words) as caught:
        qf.train(graph(qat=False), data, progress=False)
    assert caught.value.stage == "train"


def test_an_eager_model_is_refused():
    with pytest.raises(qf.QuantflowError, match=r"Exported\.module"):
        qf.train(ConvNet(), loader())
