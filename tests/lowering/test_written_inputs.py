"""Inputs that the model writes are written by the program."""

import copy

import pytest
import torch
from stateful import WritesInputs, three, worst

import quantflow as qf
from quantizers import INT8, XNNPACKQuantizer


def written(network, args, kwargs):
    """What ``network`` returns, and its inputs afterwards."""
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad():
        found = network(*args, **kwargs)
    return [found["a"], found["b"], *args, *kwargs.values()]


@pytest.mark.parametrize("scheme", [None, INT8], ids=["float", "int8"])
@pytest.mark.filterwarnings("ignore:.plan.")
def test_inputs_that_the_model_writes_are_written_by_the_program(scheme, tmp_path):
    model, (args, kwargs) = WritesInputs().eval(), three()
    before = copy.deepcopy((args, kwargs))
    graph = qf.export(model, args, kwargs).module()
    if scheme is not None:
        data = [{"x": args[0], "y": args[1], **kwargs}]
        graph = qf.prepare(graph, XNNPACKQuantizer(scheme))
        sample = qf.Sample()
        qf.calibrate(graph, data, sample=sample, progress=False)
        graph = qf.convert(qf.recover(graph, sample, progress=False).graph)
    program = qf.export(graph, args, kwargs).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    for given, kept in zip((*args, kwargs["z"]), (*before[0], before[1]["z"]), strict=True):
        assert torch.equal(given, kept)  # by no verb on the way
    again = qf.load(program.save(tmp_path / "model.pte"))
    expected, converted = written(model, args, kwargs), written(graph, args, kwargs)
    assert worst(expected, converted) > 30
    for found in (written(program, args, kwargs), written(again, args, kwargs)):
        assert worst(converted, found) > 35
        assert all(torch.equal(x, y) for x, y in zip(converted[3:4], found[3:4], strict=True))  # y is not written
