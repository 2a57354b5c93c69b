"""The training loop: it learns, freezes on schedule, and says what is wrong."""

import copy
import shutil

import matplotlib as mpl
import pytest
import torch
from networks import ConvNet
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from training_data import X, Y, graph, loader

import quantflow as qf

mpl.use("Agg")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


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


@needs_compiler
def test_compiled_training_follows_eager():
    losses = {}
    start = graph()
    for compiled in (False, True):
        trained = copy.deepcopy(start)
        losses[compiled] = qf.train(trained, loader(), epochs=2, lr=0.01, compile=compiled, progress=False).loss
        qf.convert(trained)
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


def test_mixed_precision_trains():
    assert qf.train(graph(), loader(), epochs=4, lr=0.05, amp=True, progress=False).loss[-1] < 1.5


def test_patience_stops_and_the_best_is_kept():
    figures = iter([0.0, 0.1, 0.9, 0.2, 0.3, 0.95])
    weights = []

    def validate(trained):
        weights.append(trained.head.weight.detach().clone())
        return next(figures)

    trained = graph()
    history = qf.train(trained, loader(), epochs=5, lr=0.05, validate=validate, patience=2, progress=False)
    assert history.metric == [0.1, 0.9, 0.2, 0.3]
    assert history.best_epoch == 1
    assert torch.equal(trained.head.weight, weights[2])
    assert len(history.plot().axes) == 2


@pytest.mark.parametrize("figures", [[0.5, 0.4, 0.1, 0.2, 0.3], [0.5, float("nan"), 0.1]])
def test_training_never_ends_below_its_start(figures):
    trained, given = qf.calibrate(graph(), [X], progress=False), iter(figures)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    history = qf.train(
        trained, loader(), epochs=2, lr=0.05, validate=lambda graph: next(given), patience=2, progress=False
    )
    assert history.start_metric == 0.5
    assert len(history.metric) == 2  # two epochs without a better figure
    assert history.best_epoch == -1
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())


def test_an_epoch_as_good_as_the_start_is_kept_and_a_start_that_is_no_number_is_not():
    for figures, kept in (([0.5, 0.5, 0.5], 0), ([float("nan"), 0.1, 0.2], 1)):
        given = iter(figures)
        trained = qf.calibrate(graph(), [X], progress=False)
        history = qf.train(trained, loader(), epochs=2, lr=0.05, validate=lambda _: next(given), progress=False)  # noqa: B023
        assert history.best_epoch == kept


def test_a_start_without_ranges_is_never_kept():
    trained, figures = graph(), iter([0.9, 0.1])
    assert qf.train(trained, loader(), lr=0.05, validate=lambda _: next(figures), progress=False).best_epoch == 0
    qf.convert(trained)


def test_no_patience_trains_an_epoch():
    history = qf.train(graph(), loader(), epochs=3, lr=0.05, validate=lambda _: 0.5, patience=0, progress=False)
    assert len(history.loss) == 1


def test_schedule_is_data():
    schedule = qf.Schedule(0.1, 0.2, 0.3)
    assert qf.Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(qf.QuantflowError, match="unknown key"):
        qf.Schedule.from_json('{"speed": 1}')
    with pytest.raises(qf.QuantflowError, match="no fraction"):
        qf.Schedule(freeze_observers=2)


def test_freezes_on_schedule():
    trained = graph()
    states = []

    def look(_):
        states.append((trained.batch_norm_frozen, trained.quantization.hardtanh_.observer_enabled))
        return 0.0

    schedule = qf.Schedule(freeze_batch_norm=0.5, freeze_observers=0.75)
    qf.train(trained, loader(), epochs=4, schedule=schedule, validate=look, progress=False)
    assert states == [
        (False, True),
        (False, True),
        (False, True),
        (True, True),
        (True, False),
    ]  # before, after each epoch
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


LOSSES = {
    r"is of shape \[8\]": lambda output, target: F.cross_entropy(output, target, reduction="none"),
    "is a float": lambda output, target: 1.0,
    "depends on no parameter": lambda output, target: F.cross_entropy(output.detach(), target),
}


@pytest.mark.parametrize("words", LOSSES)
def test_a_loss_that_is_none_is_named(words):
    with pytest.raises(qf.QuantflowError, match=f"batch 0: the loss {words}"):
        qf.train(graph(), loader(), loss=LOSSES[words], progress=False)


class Told(SequentialSampler):
    """Hears of each epoch."""

    def set_epoch(self, epoch):
        self.epochs = [*getattr(self, "epochs", []), epoch]


@pytest.mark.parametrize("in_batches", [False, True])
def test_a_sampler_hears_of_each_epoch_once_wherever_it_stands(in_batches):
    data = TensorDataset(X, Y)
    sampler = Told(data)
    given = {"batch_sampler": BatchSampler(sampler, 8, False)} if in_batches else {"sampler": sampler, "batch_size": 8}
    data_loader = DataLoader(data, **given, generator=torch.Generator())
    qf.train(graph(), data_loader, epochs=2, seed=2**62, progress=False)
    assert sampler.epochs == [0, 1]
