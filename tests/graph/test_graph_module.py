"""The captured graph's modes: the eager model's own dropout and batch norm, through every copy."""

import copy
import pickle

import pytest
import torch
from networks import ConvNet, NoGradInside, norm_networks, randomize_statistics
from torch import nn
from torch.nn import functional as F

import quantflow as qf

NETWORKS = norm_networks()


def step(module, x):
    """Output, gradients and buffers of one step, as the layer's mode has them."""
    torch.manual_seed(3)
    module.zero_grad()
    y = module(x)
    y.square().mean().backward()
    return y.detach(), {k: p.grad for k, p in module.named_parameters()}, dict(module.named_buffers())


def assert_same_step(ours, eager):
    assert torch.allclose(ours[0], eager[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(ours[1:], eager[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.allclose(mine[name].float(), tensor.float(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("name", NETWORKS)
def test_follows_eager_through_mode_switches(name):
    model, x = NETWORKS[name]
    model = randomize_statistics(copy.deepcopy(model))
    graph = qf.export(model, (x,)).module()
    for mode in (True, False, True, True, False):
        graph.train(mode)
        model.train(mode)
        assert_same_step(step(graph, x), step(model, x))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
    "deepcopy of pickle": lambda graph: copy.deepcopy(pickle.loads(pickle.dumps(graph))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", [True, False])
def test_copies_switch_modes(how, mode):
    model = randomize_statistics(ConvNet(p=0.4)).train(mode)
    x = torch.randn(4, 3, 16, 16)
    twin = COPIES[how](qf.export(model, (x,), dynamic_batch=True).module())
    assert twin.training is mode
    for training in (not mode, mode, not mode):
        twin.train(training)
        model.train(training)
        assert_same_step(step(twin, x), step(model, x))
    assert [k for k, _ in twin.named_parameters()] == [k for k, _ in model.named_parameters()]


def test_state_dict_passes_both_ways():
    x = torch.randn(4, 3, 16, 16)
    model, other = ConvNet(), randomize_statistics(ConvNet())
    graph = qf.export(model, (x,)).module()
    assert list(graph.state_dict()) != []
    assert set(graph.state_dict()) == set(model.state_dict())
    graph.load_state_dict(other.state_dict())
    model.load_state_dict(graph.state_dict())
    assert torch.allclose(graph.eval()(x), other.eval()(x), atol=1e-6)
    assert torch.equal(model.eval()(x), other(x))


class Tied(nn.Module):
    """A weight and a batch norm under two names each, the second of which no strict capture reads."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.last.weight, self.again = self.first.weight, self.norm

    def forward(self, x):
        return self.again(self.last(torch.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_shared_stays_shared(strict):
    model, x = Tied(), torch.randn(4, 8)
    graph = copy.deepcopy(qf.export(model, (x,), strict=strict).module())
    state = graph.state_dict(keep_vars=True)
    assert state.keys() == model.state_dict().keys()
    for name, other in (("first.weight", "last.weight"), ("norm.running_mean", "again.running_mean")):
        assert state[name] is state[other]
    assert len(list(graph.parameters())) == len(list(model.parameters()))
    assert_same_step(step(graph, x), step(model, x))
    qf.train(graph, [(x, torch.arange(4))] * 2, lr=0.5, progress=False)
    model.load_state_dict(graph.state_dict())
    assert torch.allclose(model.eval()(x), graph.eval()(x), atol=1e-5)


def test_a_copy_is_independent():
    x = torch.randn(4, 3, 16, 16)
    graph = qf.export(ConvNet(), (x,)).module()
    twin = copy.deepcopy(graph)
    twin.eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert graph.training
    assert graph(x).abs().sum() > 0


def test_frozen_batch_norm_stays_in_inference_while_dropout_trains():
    model = randomize_statistics(ConvNet(p=0.5))
    x = torch.randn(4, 3, 16, 16)
    graph = qf.export(model, (x,)).module().train().freeze_batch_norm()
    before = graph.stem_bn.running_mean.clone()
    assert not torch.equal(graph(x), graph(x))
    assert torch.equal(graph.stem_bn.running_mean, before)
    graph.freeze_batch_norm(False)
    graph(x)
    assert not torch.equal(graph.stem_bn.running_mean, before)


class PrecisionInRegions(nn.Module):
    """Regions that never train, each with a body of its own inside: export calls them by the same name."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.norm(self.backbone(x))
            x = x.float() * 2
        x = self.head(x)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            scores = x @ x.T
        return x * scores.float().mean()


@pytest.mark.parametrize("copied", [False, True])
def test_regions_keep_bodies_of_their_own(copied):
    model, x = PrecisionInRegions(), torch.randn(3, 6)
    graph = qf.export(model, (x,)).module()
    graph = pickle.loads(pickle.dumps(copy.deepcopy(graph))) if copied else graph
    for mode in (True, False):
        assert torch.equal(graph.train(mode)(x), model.train(mode)(x))
        assert all(torch.equal(graph.get_buffer(name), buffer) for name, buffer in model.named_buffers())
    for module in (graph, model):
        module(x).sum().backward()
    for name, parameter in model.named_parameters():
        mine = graph.get_parameter(name).grad
        assert (mine is None) == (parameter.grad is None)
        assert mine is None or torch.allclose(mine, parameter.grad)


class FailsInside(nn.Module):
    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return x @ x


def test_a_graph_that_raises_in_a_region_leaves_no_mode_behind():
    graph = qf.export(FailsInside(), (torch.randn(4, 4),)).module()
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            graph(torch.randn(4, 3))
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    after = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert after == depth


class MonteCarloDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


def test_what_is_always_in_training_mode_stays_so():
    x = torch.ones(64, 64)
    graph = qf.export(MonteCarloDropout(), (x,)).module()
    for mode in (True, False):
        assert (graph.train(mode)(x) == 0).any()


def test_distributed_data_parallel_takes_it(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        x = torch.randn(4, 3, 16, 16)
        graph = qf.export(ConvNet(p=0.0), (x,)).module()
        parallel = nn.parallel.DistributedDataParallel(graph)
        parallel.train()
        parallel(x).sum().backward()
        assert all(p.grad is not None for p in graph.parameters())
        parallel.eval()
        assert not graph.training
        assert torch.equal(parallel(x), parallel(x))
    finally:
        torch.distributed.destroy_process_group()


def test_grad_mode_does_not_leak_out_of_a_graph():
    graph = qf.export(NoGradInside(), (torch.randn(3, 6),)).module()
    for twin in (graph, copy.deepcopy(graph)):
        with torch.no_grad():
            assert not twin(torch.randn(3, 6)).requires_grad
            assert not torch.is_grad_enabled()
        assert twin(torch.randn(3, 6)).requires_grad
        with pytest.raises(RuntimeError):
            twin(torch.randn(3, 5))
        assert torch.is_grad_enabled()


def test_batch_norm_frozen_by_the_user_stays_frozen_in_training():
    x = torch.randn(4, 3, 16, 16)
    graph = qf.export(randomize_statistics(ConvNet()), (x,)).module().freeze_batch_norm()
    before = graph.stem_bn.running_mean.clone()
    qf.train(graph, [(x, torch.arange(4))] * 2, progress=False)
    assert torch.equal(graph.stem_bn.running_mean, before)
    assert graph.batch_norm_frozen


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_constants_of_the_trace_are_no_state():
    model = Constant()
    graph = qf.export(model, (torch.randn(2, 4),)).module()
    assert set(graph.state_dict()) == set(model.state_dict())
    graph.load_state_dict(model.state_dict())
    twin = copy.deepcopy(graph)
    assert torch.equal(twin(torch.ones(2, 4)), model(torch.ones(2, 4)))
    assert set(twin.state_dict()) == set(model.state_dict())
