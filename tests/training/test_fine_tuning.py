"""Training goes on from recovered PTQ by default: close to the float network, in small steps of the grid, never below."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_data import X, Y, graph, loader

import quantflow as qf
from quantflow.simulation.float_network import float_network
from quantflow.simulation.float_weights import has_teacher
from quantflow.training.fine_tuning import fine_tuning
from quantflow.training.grid_adam import GridAdam
from quantizers import W4A8, Scheme, XNNPACKQuantizer


class Deep(nn.Module):
    """Enough layers that what one rounds away another can make good."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        layers = (nn.Conv2d(8, 8, 3, padding=1, groups=8 if i % 2 else 1) for i in range(6))
        self.layers = nn.Sequential(*(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU6()) for conv in layers))

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def recovered():
    prepared = qf.prepare(graph(qat=False).eval(), XNNPACKQuantizer(W4A8), qat=True)
    return qf.recover(qf.calibrate(prepared, [X], progress=False), [X[:16], X[16:]], progress=False).graph


@pytest.mark.slow
@pytest.mark.parametrize("kind", [qf.FakeQuantize, qf.LearnedStepSize])
@pytest.mark.parametrize("bits", [8, 3])  # recovery leaves little to gain at 4 bits in so small a network
def test_it_comes_closer_to_the_float_network(bits, kind):
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(256, 3, 12, 12) + 2 * torch.randn(256, 3, 1, 1)
    for _ in range(20):
        model(x)  # statistics
    network = qf.export(model.eval(), (x[:8],), dynamic_batch=True).module().eval()
    scheme = Scheme(weight=replace(Scheme().weight, bits=bits))
    prepared = qf.prepare(network, XNNPACKQuantizer(scheme), qat=True, fake_quantize=kind)
    student = qf.recover(qf.calibrate(prepared, [x[:64]], progress=False), list(x[:64].split(16)), progress=False).graph
    measure = qf.Fidelity(network, [x[192:]])
    before = measure(student)
    history = qf.train(student, DataLoader(x[:192], 8, shuffle=True), epochs=4, validate=measure, progress=False)
    assert history.start_metric == before
    assert measure(student) == max(before, *history.metric)
    assert measure(student) > before
    if bits < 8:  # with 8 bits the rounding of biases, which conversion does, counts as much as the gain
        assert measure(qf.convert(student)) > before + 0.3


@pytest.mark.parametrize(("steps", "travel"), [(40, 0.4), (400, 2.0)])
def test_weights_move_by_two_steps_of_their_grids_at_most(steps, travel):
    student = recovered()
    start = copy.deepcopy(student)
    optimizer, scheduler = fine_tuning(student, steps)
    rates = [[], []]
    for _ in range(steps):
        for kept, group in zip(rates, optimizer.param_groups, strict=True):
            kept.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert sum(rates[0]) == pytest.approx(travel, rel=0.01)
    assert rates[0][-1] < 0.05 * max(rates[0])
    assert rates[0][0] < max(rates[0])
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))


def test_a_recovered_graph_needs_no_labels_and_does_not_read_them():
    losses = []
    for data in ([X[:16], X[16:]], [(X[:16], Y[:16]), (X[16:], Y[16:] * 0)]):
        student = recovered()
        assert has_teacher(student)
        losses.append(qf.train(student, data, progress=False).loss)
    assert losses[0] == losses[1]


def test_training_goes_on_with_the_same_teacher():
    student = recovered()
    teacher = float_network(student)(X)
    rates = [len(qf.train(student, [X[:16], X[16:]], progress=False).frozen_weights) for _ in range(2)]
    assert rates == [1, 1]
    assert torch.equal(float_network(student)(X), teacher)
    assert torch.equal(float_network(pickle.loads(pickle.dumps(student)))(X), teacher)


def test_a_recovery_that_keeps_nothing_has_a_teacher_too():
    torch.manual_seed(0)
    network = qf.export(nn.Linear(8, 4).eval(), (X[:2, 0, 0, :8],), dynamic_batch=True).module()
    prepared = qf.prepare(network, XNNPACKQuantizer(), qat=True)
    qf.calibrate(prepared, [X[:, 0, 0, :8]], progress=False)
    student = qf.recover(prepared, [X[:1, 0, 0, :8]], progress=False).graph
    assert torch.equal(float_network(student)(X[:, 0, 0, :8]), network(X[:, 0, 0, :8]))
    assert has_teacher(student)


def test_a_loss_that_is_given_counts_beside_the_teacher():
    calls = []

    def loss(output, target):
        calls.append(target)
        return torch.nn.functional.cross_entropy(output, target)

    qf.train(recovered(), loader(), loss=loss, progress=False)
    assert len(calls) == len(loader())


def test_other_graphs_and_a_given_rate_train_as_before():
    plain = graph()
    qf.calibrate(plain, [X], progress=False)
    other = copy.deepcopy(plain)
    assert not has_teacher(plain)
    losses = [
        qf.train(plain, loader(), progress=False).loss,
        qf.train(other, loader(), lr=1e-3, distill=None, progress=False).loss,
    ]
    assert losses[0] == losses[1]
    # With a rate it is SGD: no weights are looked at for oscillation.
    assert qf.train(recovered(), loader(), lr=1e-3, distill=None, progress=False).frozen_weights == []
    assert len(qf.train(recovered(), loader(), progress=False).frozen_weights) == 1


def test_an_iterable_without_length_trains_at_a_constant_rate():
    optimizer, scheduler = fine_tuning(recovered(), None)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    assert isinstance(optimizer, GridAdam)
    assert optimizer.param_groups[0]["lr"] == rate > 0
    assert len(qf.train(recovered(), iter([X[:16], X[16:]]), progress=False).loss) == 1


def test_a_cut_run_ends_with_the_same_bits(tmp_path):
    class CutShort(BaseException):
        pass

    def run(folder, *, cut=None):
        student, seen = recovered(), []

        def loss(output, target):
            seen.append(len(seen))
            if len(seen) == cut:
                raise CutShort
            return torch.nn.functional.cross_entropy(output, target)

        checkpoints = qf.Checkpoints(folder, every=1)
        measure = qf.Fidelity(float_network(student), [X])
        data = DataLoader(list(zip(X, Y, strict=True)), 8, shuffle=True, generator=torch.Generator())
        try:
            given = {"loss": loss, "validate": measure, "checkpoints": checkpoints, "progress": False}
            return student, qf.train(student, data, epochs=3, **given)
        except CutShort:
            return run(folder)

    straight, history = run(tmp_path / "straight")
    again, resumed = run(tmp_path / "cut", cut=7)
    assert resumed.resumed_at == [6]
    assert resumed.metric == history.metric
    assert resumed.frozen_weights == history.frozen_weights
    for name, tensor in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_dropout_is_off_while_the_teacher_is_followed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 5))
    x = torch.randn(16, 3, 8, 8)
    network = qf.export(model.eval(), (x[:2],), dynamic_batch=True).module().eval()
    prepared = qf.prepare(network, XNNPACKQuantizer(), qat=True)
    student = qf.recover(qf.calibrate(prepared, [x], progress=False), [x[:8], x[8:]], progress=False).graph
    with torch.no_grad():
        wanted, found = network(x), student.eval()(x)
    history = qf.train(student, [x], progress=False)
    assert history.loss[0] == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()), rel=1e-3)
