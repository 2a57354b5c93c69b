"""Killed at any moment and started again, a training ends with the same bits."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from networks import ConvNet
from torch.utils.data import DataLoader, TensorDataset

import quantflow as qf
from quantflow.training.checkpoint import read_checkpoint
from quantflow.training.randomness import random_state, set_random_state
from quantflow.training.state import TrainingState
from quantizers import XNNPACKQuantizer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "killed_training.py"


class Trainings:
    """Trainings one after another, each in a process forked from one that has all imported."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.server = subprocess.Popen([sys.executable, str(SCRIPT)], text=True, **pipes)

    def start(self, folder):
        print(folder, file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def steps(self, count):
        for _ in range(count):
            assert self.server.stdout.readline() == "step\n"

    def code(self):
        """The exit code, at the end."""
        for line in self.server.stdout:
            if line.startswith("ended"):
                return int(line.split()[1])
        raise EOFError


@pytest.fixture
def trainings():
    trainings = Trainings()
    with trainings.server:
        yield trainings
        trainings.server.stdin.close()


def test_killed_at_ten_random_steps_ends_with_the_same_bits(trainings, tmp_path):
    trainings.start(tmp_path / "undisturbed")
    assert trainings.code() == 0
    rng = random.Random(7)
    for _ in range(10):
        # Each life runs some steps of the 60 on, and is killed at a random moment within a step.
        pid = trainings.start(tmp_path / "killed")
        trainings.steps(rng.randint(1, 4))
        time.sleep(rng.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        assert trainings.code() == -signal.SIGKILL
    trainings.start(tmp_path / "killed")
    assert trainings.code() == 0
    for name in ("weights.safetensors", "model.pte"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def run(folder, epochs=2, *, lr=0.05, **options):
    torch.manual_seed(5)
    images, labels = torch.randn(24, 3, 16, 16), torch.arange(24) % 5
    graph = qf.export(ConvNet(p=0.3), (images[:2],), dynamic_batch=True).module()
    graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    loader = DataLoader(TensorDataset(images, labels), 8, shuffle=True)
    checkpoints = qf.Checkpoints(folder, every=2)
    history = qf.train(graph, loader, epochs=epochs, lr=lr, checkpoints=checkpoints, progress=False, **options)
    return graph.state_dict(), history, checkpoints


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_is_not_repeated(tmp_path):
    first, _, checkpoints = run(tmp_path)
    assert len(checkpoints.paths()) == 2
    again, history, _ = run(tmp_path)
    assert same(first, again)
    assert history.resumed_at == [6]


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, damage):
    expected, _, checkpoints = run(tmp_path, ema=0.9, clip_norm=1.0)
    newest = checkpoints.paths()[-1]
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-100] ^= 1
        newest.write_bytes(content)
    else:
        newest.write_bytes(b"hello" if damage == "text" else b"")
    with pytest.raises(qf.QuantflowError):
        read_checkpoint(newest)
    with pytest.warns(qf.QuantflowWarning, match=newest.name):
        again, history, _ = run(tmp_path, ema=0.9, clip_norm=1.0)
    assert history.resumed_at == [4]
    assert same(expected, again)


def test_a_foreign_checkpoint_is_named_and_passed_over(tmp_path):
    run(tmp_path)
    with pytest.warns(qf.QuantflowWarning, match="another training"):
        _, history, _ = run(tmp_path, lr=0.1)
    assert history.resumed_at == []


def test_a_training_is_the_same_in_another_process_and_in_either_mode():
    """Where a function of Python lies in memory does not tell a training."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=None))
    graph = qf.export(model.train(), (torch.randn(2, 3),)).module()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    state = TrainingState(graph, optimizer, None, None, None)
    found = {state.fingerprint() for mode in (False, True) if graph.train(mode)}
    functions = [node for node in graph.graph.nodes if isinstance(node.target, types.FunctionType)]
    assert functions
    for node in functions:
        node.target = functools.wraps(node.target)(lambda *args: None)  # as it lies in another process
    assert {state.fingerprint()} == found


def test_resuming_keeps_averages_best_and_history(tmp_path):
    probe = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    left = [10**6]

    def validate(graph):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return float(graph(probe).std())

    options = {"ema": 0.8, "validate": validate, "validate_converted": True}
    expected, history, _ = run(tmp_path / "whole", 4, **options)
    left[0] = 5  # two calls an epoch: in the third
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 4, **options)
    left[0] = 10**6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, resumed, _ = run(tmp_path / "cut", 4, **options)
    assert same(expected, again)
    assert resumed.metric == history.metric
    assert resumed.converted_metric == history.converted_metric
    assert resumed.best_epoch == history.best_epoch
    assert resumed.resumed_at


@pytest.mark.parametrize("every", [0, -3, 1.5])
def test_an_interval_that_is_none_is_named(tmp_path, every):
    with pytest.raises(qf.QuantflowError, match=r"checkpoints: every .* steps is no interval"):
        qf.Checkpoints(tmp_path, every=every)


def test_the_random_state_of_a_gpu_that_is_not_here_is_passed_over():
    state = random_state()
    expected = torch.rand(3)
    set_random_state({**state, f"cuda{torch.cuda.device_count() + 1}": torch.zeros(16, dtype=torch.uint8)})
    assert torch.equal(torch.rand(3), expected)
