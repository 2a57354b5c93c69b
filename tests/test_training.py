"""The training loop: it learns, freezes on schedule, and says what is wrong."""

import copy
import shutil

import matplotlib as mpl
import pytest
import torch
from networks import ConvNet, WritesAPart
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from torchvision.ops import StochasticDepth

import quantflow as qf
from quantflow.training.features import recorded_features
from quantizers import XNNPACKQuantizer

mpl.use("Agg")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
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
    assert len(seen) == 2
    assert not any("recorders" in code for code in seen)
    assert "batch_norm" not in seen[1]


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


def test_patience_stops_and_the_best_is_kept():
    figures = iter([0.1, 0.9, 0.2, 0.3, 0.95])
    weights = []

    def validate(trained):
        weights.append(trained.head.weight.detach().clone())
        return next(figures)

    trained = graph()
    history = qf.train(trained, loader(), epochs=5, lr=0.05, validate=validate, patience=2, progress=False)
    assert history.metric == [0.1, 0.9, 0.2, 0.3]
    assert history.best_epoch == 1
    assert torch.equal(trained.head.weight, weights[1])
    assert len(history.plot().axes) == 2


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


class DropsItsBranch(nn.Module):
    """Stochastic depth, an auxiliary head, and dropout of a kind that nodes do hold."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
        self.depth, self.off = StochasticDepth(0.2, "row"), StochasticDepth(0.0, "row")

    def forward(self, x):
        x = F.dropout(x + self.off(self.depth(self.stem(x))), 0.1, training=self.training)
        return self.head(x)


class Renamed(StochasticDepth):
    """Its forward is that of its base."""


class Checkpointed(nn.Module):
    """A base whose branch computes the same."""

    gradient_checkpointing = False

    def __call__(self, *args):
        if self.gradient_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(super().__call__, *args)
        return super().__call__(*args)


class Plain(Checkpointed):
    def forward(self, x):
        return x * 2


class Widened(nn.MultiheadAttention):
    """Branches on its own, besides what attention does."""

    def forward(self, x):
        return x * 2 if self.training else super().forward(x, x, x)[0]


class DropsInBranches(DropsItsBranch):
    """The layer and the network are both subclasses, and a class of torch.nn is one's base."""

    def __init__(self):
        super().__init__()
        self.depth, self.attention = Renamed(0.2, "row"), Widened(4, 1)
        self.plain = Plain()

    def forward(self, x):
        return super().forward(self.plain(self.attention(x)))


def test_subclasses_that_train_as_in_inference_are_named():
    found = qf.export(DropsInBranches(), (torch.randn(8, 4),)).inference_only
    assert found == ("depth (Renamed)", "attention (Widened)")
    parametrized = DropsItsBranch()
    torch.nn.utils.parametrizations.weight_norm(parametrized.stem)
    assert qf.export(parametrized, (torch.randn(8, 4),)).inference_only == ("depth (StochasticDepth)",)


def test_a_layer_is_switched_off_where_all_its_switches_are():
    model = DropsItsBranch()
    model.depth.drop_prob = 0.0
    assert qf.export(model, (torch.randn(8, 4),)).inference_only == ("depth (StochasticDepth)",)
    model.depth.p = 0.0
    assert qf.export(model, (torch.randn(8, 4),)).inference_only == ()


def test_layers_that_train_as_in_inference_are_named():
    exported = qf.export(DropsItsBranch(), (torch.randn(8, 4),))
    assert exported.inference_only == ("depth (StochasticDepth)",)
    again = qf.export(exported.module(), (torch.randn(8, 4),)).module()
    batch = (torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    with pytest.warns(qf.QuantflowWarning, match=r"depth \(StochasticDepth\)"):
        qf.train(qf.prepare(again, XNNPACKQuantizer(), qat=True), [batch], progress=False)
    assert qf.export(ConvNet(), (X[:2],)).inference_only == ()


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
