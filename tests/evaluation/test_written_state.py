"""Stages that write in place: each has a state and inputs of its own."""

import copy

import pytest
import torch
from stateful import WritesInputs, three
from torch import nn

import quantflow as qf


def test_verify_gives_each_stage_the_inputs_as_they_were():
    model, (args, kwargs) = WritesInputs().eval(), three()
    exported = qf.export(model, args, kwargs)
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    batch = {"x": args[0], "y": args[1], **kwargs}
    before = copy.deepcopy(batch)
    stages = {"graph": exported.module(), ".pte": program, "again": program, "eager": model}
    figures = qf.verify(stages, [batch], latency_runs=0, progress=False)
    assert min(output.sqnr_db for stage in figures.stages[1:] for output in stage.outputs) > 60
    assert all(torch.equal(batch[name], given) for name, given in before.items())


class Remembers(nn.Module):
    """Returns its state itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, x):
        self.last.add_(x)
        return self.last


def eager(model, x):
    return model


def captured(model, x):
    return qf.export(model, (x,)).module().eval()


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("second", [eager, captured])
def test_each_stage_has_a_state_of_its_own_and_its_outputs_are_kept(second, rows):
    model, data = Remembers(), [(torch.full((rows, 3), 1.0), torch.full((rows,), float(k))) for k in range(4)]
    first = captured(model, data[0][0][:2])  # takes the four rows in pieces
    seen = []

    def metric(outputs, targets):
        seen.append((outputs[:, 0].tolist(), targets.tolist()))
        return 0.0

    stages = {"first": first, "second": second(first if rows == 4 else model, data[0][0][:2])}
    found = qf.verify(stages, data, metric=metric, latency_runs=0, progress=False)
    expected = torch.arange(1.0, 1 + 2 * rows).repeat_interleave(2).tolist()
    assert seen == [(expected, [float(k) for k in range(4) for _ in range(rows)])] * 2
    assert found.stages[1].output.sqnr_db == float("inf")
    assert torch.equal(model.last, torch.zeros(2, 3))
