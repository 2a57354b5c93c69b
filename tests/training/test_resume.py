"""A run that is cut and resumed ends with the bits of one that is not, with every optimizer and scheduler of torch."""

import copy
import functools
import inspect
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader, Dataset

import quantflow as qf
from quantflow.training.encoding import difference, encode

pytestmark = pytest.mark.slow

STEPS = 8  # two epochs of four


class CutShort(BaseException):
    """The end of a run's first life."""


class Augmented(Dataset):
    """Examples with noise from every generator there is, drawn as they are read."""

    def __init__(self):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(16, 4), torch.arange(16) % 5

    def __len__(self):
        return 16

    def __getitem__(self, index):
        noise = torch.randn(4) + random.gauss(0, 1) + np.random.randn()
        return self.x[index] + 0.1 * noise.float(), self.y[index]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 5)

    def forward(self, x):
        return self.second(self.drop(torch.relu(self.first(x))))


@functools.cache
def captured():
    torch.manual_seed(0)
    return qf.export(Network(), (torch.randn(2, 4),), dynamic_batch=True).module()


def run(folder, make_optimizer, make_scheduler, *, validate=None, cut=None):
    """The state, the learning rates and more of a run, which ends before step ``cut`` and is resumed."""
    graph = copy.deepcopy(captured())
    optimizer = make_optimizer(graph)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    rates = []

    def loss(output, target):
        if len(rates) + 1 == cut:
            raise CutShort
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        return F.cross_entropy(output, target)

    loader, checkpoints = DataLoader(Augmented(), 4, shuffle=True), qf.Checkpoints(folder, every=1)
    given = {"optimizer": optimizer, "scheduler": scheduler, "validate": validate, "checkpoints": checkpoints}
    try:
        history = qf.train(graph, loader, epochs=2, loss=loss, progress=False, **given)
    except CutShort:
        return run(folder, make_optimizer, make_scheduler, validate=validate)
    return graph.state_dict(), rates, history, optimizer, scheduler


def resumes_alike(tmp_path, make_optimizer, make_scheduler=None, *, cut, **options):
    straight, rates, history, optimizer, scheduler = run(
        tmp_path / "straight", make_optimizer, make_scheduler, **options
    )
    again, later, resumed, optimizer2, scheduler2 = run(
        tmp_path / "cut", make_optimizer, make_scheduler, cut=cut, **options
    )
    assert resumed.resumed_at == [cut - 1]
    assert later == rates[cut - 1 :]
    for name, tensor in straight.items():
        assert torch.equal(again[name], tensor), name
    assert resumed.loss == history.loss
    assert not torch.equal(straight["first.weight"], captured().first.weight)  # it moved at all
    for one, other in ((optimizer, optimizer2), (scheduler, scheduler2)):
        tensors, others = {}, {}
        if one is not None:
            states = encode(one.state_dict(), "", tensors), encode(other.state_dict(), "", others)
            assert difference(*states, tensors, others) is None


OPTIMIZERS = {
    "ASGD": {"lr": 0.05, "t0": 2},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": torch.tensor(0.01)},  # a rate that is a tensor
    "Adamax": {"lr": 0.01},
    "Muon": {"lr": 0.05},
    "NAdam": {"lr": 0.01, "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "centered": True, "momentum": 0.9},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
}
REFUSED = {"LBFGS": "several times a step", "SparseAdam": "takes no step"}


def optimizer_of(name, **options):
    def make(graph):
        # Muon is for matrices.
        parameters = [p for p in graph.parameters() if name != "Muon" or p.ndim == 2]
        given = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        return getattr(torch.optim, name)(parameters, **given)

    return make


def test_no_optimizer_or_scheduler_of_torch_is_left_out():
    kinds = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert kinds - {"Optimizer"} == OPTIMIZERS.keys() | REFUSED.keys()
    kinds = {
        c.__name__
        for c in vars(lr_scheduler).values()
        if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)
    }
    covered = {name.split(",")[0] for name in SCHEDULERS}
    assert kinds - {"LRScheduler", "_LRScheduler"} == covered - {"SWALR"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(tmp_path, name):
    resumes_alike(tmp_path, optimizer_of(name, **OPTIMIZERS[name]), cut=6)


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_can_not_be_used_is_named(tmp_path, name):
    with pytest.raises(qf.QuantflowError, match=f"{name}: .*{REFUSED[name]}"):
        run(tmp_path, optimizer_of(name, lr=0.1), None)


class Warmup:
    """A factor with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1 / (1 + self.calls)


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.MultiStepLR(optimizer, [2, 4])]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=3), lr_scheduler.LambdaLR(optimizer, Warmup())]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULERS = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "CyclicLR, scaled": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 1 / (1 + x)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR, stateful": lambda o: lr_scheduler.LambdaLR(o, Warmup()),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 6]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, three_phase=True),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5, cooldown=1),
    "ReduceLROnPlateau, of validate": lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.001, anneal_epochs=5),
    "SequentialLR": sequential,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
}


@pytest.mark.parametrize("cut", [3, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(tmp_path, name, cut):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of lambdas, which torch does not save
        optimizer = optimizer_of("SGD", lr=0.05, momentum=0.9)
        resumes_alike(tmp_path, optimizer, SCHEDULERS[name], cut=cut, validate=lambda graph: 1.0)


def test_a_plateau_lowers_the_rate():
    """After each epoch, by the figure that its mode stands for."""
    graph = copy.deepcopy(captured())
    optimizer = torch.optim.SGD(graph.parameters(), 0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
    rates = []
    qf.train(
        graph,
        DataLoader(Augmented(), 4),
        epochs=3,
        optimizer=optimizer,
        scheduler=scheduler,
        validate=lambda graph: rates.append(optimizer.param_groups[0]["lr"]) or 0.5,
        progress=False,
    )
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01])  # before the first epoch, after each
    with pytest.raises(qf.QuantflowError, match=r'ReduceLROnPlateau: mode "max"'):
        qf.train(graph, DataLoader(Augmented(), 4), optimizer=optimizer, scheduler=scheduler, progress=False)


class Unsaveable(torch.optim.SGD):
    """Its state holds what only pickle knows."""

    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["note"] = object()


class Forgetful(torch.optim.SGD):
    """It does not take up what it gave."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "state": {}})


def test_what_can_not_be_saved_is_refused_at_the_first_step(tmp_path):
    steps = []

    def loss(output, target):
        steps.append(1)
        return F.cross_entropy(output, target)

    graph = copy.deepcopy(captured())
    checkpoints = qf.Checkpoints(tmp_path)
    given = {"loss": loss, "checkpoints": checkpoints, "progress": False}
    with pytest.raises(qf.QuantflowError, match=r"optimizer\.state\.0\.note: a object can't be saved without pickle"):
        qf.train(graph, DataLoader(Augmented(), 4), optimizer=Unsaveable(graph.parameters(), 0.1), **given)
    assert len(steps) == 1
    sgd = torch.optim.SGD(graph.parameters(), 0.1)

    class Bare:
        def step(self):
            raise AssertionError("never reached")

    with pytest.raises(qf.QuantflowError, match="scheduler: a Bare has no state_dict"):
        qf.train(graph, DataLoader(Augmented(), 4), optimizer=sgd, scheduler=Bare(), **given)


def test_what_does_not_take_up_its_state_is_refused(tmp_path):
    with pytest.raises(qf.QuantflowError, match="optimizer: a Forgetful does not take up the state that it gave"):
        run(tmp_path, lambda graph: Forgetful(graph.parameters(), 0.1, momentum=0.9), None, cut=3)


def test_another_learning_rate_is_another_training(tmp_path):
    run(tmp_path, optimizer_of("SGD", lr=0.05), None)
    with pytest.warns(qf.QuantflowWarning, match="another training"):
        _, rates, history, *_ = run(tmp_path, optimizer_of("SGD", lr=0.01), None)
    assert not history.resumed_at
    assert rates == [[0.01]] * STEPS
