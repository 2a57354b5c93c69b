"""Laws of the differential fuzzer: it repeats, survives, finds, shrinks."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from fuzzing import compare as comparing
from fuzzing.generate import generate, runs
from fuzzing.isolate import Ended, isolated
from fuzzing.minimise import minimised
from fuzzing.network import Input, Network, Statement
from fuzzing.rounding import float_noise, one_step_noise, outputs_of
from fuzzing.verdict import answer, judge

import quantflow as qf
from quantizers import XNNPACKQuantizer


def verdict_of(network, path):
    return judge(Ended((network, path), "returned", answer((network, path))))


def test_a_seed_is_a_network_its_weights_and_its_inputs():
    state = torch.get_rng_state()
    first, second = generate(11), generate(11)
    assert first.source() == second.source()
    assert first.source() != generate(12).source()
    (model, calls), (again, same_calls) = first.build(), second.build()
    torch.testing.assert_close(dict(model.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(calls, same_calls, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_printed_network_is_the_network():
    network = generate(11)
    space = {"__name__": "printed"}
    with torch.random.fork_rng(devices=[]):
        exec(network.source(), space)
        args, kwargs = space["inputs"]()
    model, calls = network.build()
    torch.testing.assert_close((args, kwargs), calls[0], rtol=0, atol=0)
    expected = outputs_of(model, calls[:1])
    torch.testing.assert_close(outputs_of(space["model"], [(args, kwargs)]), expected, rtol=0, atol=0)


def test_ends_of_processes(monkeypatch):
    def function(task):
        if task == "crash":
            os.write(2, b"last words")
            os.kill(os.getpid(), signal.SIGKILL)
        while task == "spin":
            pass
        if task == "hang":
            time.sleep(60)
        return {"raise": lambda: 1 / 0}.get(task, lambda: task)()

    tasks = ["fine", "crash", "raise", "hang", "spin", "also fine"]
    monkeypatch.setattr("fuzzing.isolate._PATIENCE", 3.0)
    ended = {e.task: e for e in isolated(function, tasks, jobs=3, seconds=1)}
    assert [ended[task].kind for task in tasks] == ["returned", "crash", "raised", "hang", "hang", "returned"]
    assert ended["fine"].value == "fine"
    assert "SIGKILL" in ended["crash"].text
    assert "last words" in ended["crash"].text
    assert "ZeroDivisionError" in ended["raise"].text


def layers(*lines, inputs="torch.randn(2, 4)", made=None):
    statements = tuple(Statement(line, (line.split(" = ")[0],) if " = " in line else ()) for line in lines)
    made = made or {"linear0": "self.linear0 = nn.Linear(4, 4)"}
    return Network(0, (Input("x0", inputs),), made, statements, (statements[-1].makes[0],))


def test_rounding_is_told_from_a_fault():
    steep = layers("v0 = self.linear0(x0)", "v1 = torch.sin(v0 * 1e6)")
    tame = layers("v0 = self.linear0(x0)", "v1 = torch.sin(v0)")
    for network, verdict in ((steep, comparing.AMPLIFIES), (tame, comparing.WRONG)):
        model, calls = network.build()
        expected = outputs_of(model, calls)
        with torch.no_grad():
            model.linear0.weight.mul_(1.01 if network is tame else 1 + 3e-7)
        found = outputs_of(model, calls)
        model, _ = network.build()
        compared = comparing.compare(expected, found, 60.0, lambda m=model, c=calls: float_noise(m, c))
        assert compared.verdict == verdict
        assert compared.db < 60
    assert comparing.compare(expected, expected, 60.0, lambda: []).verdict == comparing.RIGHT


def test_one_step_of_each_activation_is_measured():
    network = layers("v0 = self.linear0(x0)", "v1 = F.relu(v0)", "v2 = self.linear0(v1)")
    model, calls = network.build()
    args, _ = calls[0]
    prepared = qf.prepare(qf.export(model, args).module(), XNNPACKQuantizer())
    qf.calibrate(prepared, [args for args, _ in calls], progress=False)
    converted = qf.convert(prepared)
    expected = outputs_of(converted, calls)
    steps = {float(n.args[1]) for n in converted.graph.nodes if "quantize_per_tensor" in str(n.target)}
    for draw in one_step_noise(converted, calls, share=1.0):
        differences = [(a[0] - b[0]).abs().max() for a, b in zip(expected, draw, strict=True)]
        assert 0 < max(differences) < 30 * max(steps)


def test_integers_and_lost_outputs_are_seen():
    one = [[torch.tensor([1, 2]), torch.tensor([0.5])]]
    for other in ([[torch.tensor([1, 3]), one[0][1]]], [[one[0][0]]], [[one[0][0].int(), one[0][1]]]):
        assert comparing.compare(one, other, 60.0, lambda: [one]).verdict == comparing.WRONG


def test_minimised_to_the_operator_at_fault():
    made = {"linear0": "self.linear0 = nn.Linear(4, 4)", "linear1": "self.linear1 = nn.Linear(4, 4)"}
    lines = ("v0 = self.linear0(x0)", "v1 = torch.erf(v0)", "v2 = F.relu(v1)", "v3 = v2 + x0", "v4 = self.linear1(v3)")
    network = layers(*lines, made=made)
    small = minimised(network, lambda n: runs(n) and any("erf" in s.text for s in n.statements))
    assert [s.text for s in small.statements] == ["v1 = torch.erf(x1)"]
    assert small.used_layers() == {}


def test_faults_are_found(monkeypatch):
    """A converted graph of other numbers, an exception, and an error without a name, each planted in a right network."""
    network = layers("v0 = self.linear0(x0)")
    assert verdict_of(network, "ptq").ending == "right"
    convert = qf.convert

    def off(graph):
        converted = convert(graph)
        next(b for b in converted.buffers() if b.dtype == torch.int8).neg_()
        return converted

    def nameless(graph):
        raise qf.QuantflowError("convert", "something is wrong")

    monkeypatch.setattr(qf, "convert", off)
    assert verdict_of(network, "ptq").ending == "wrong"
    monkeypatch.setattr(qf, "convert", nameless)
    assert verdict_of(network, "ptq").ending == "unnamed error"
    (ended,) = isolated(answer_of, [(network, "float")])
    assert judge(ended).ending == "foreign"


def answer_of(case):
    raise ValueError(case[1])
