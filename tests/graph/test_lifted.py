"""Rewrites of a program on its graph: state and inputs stay, and the stages before are unchanged."""

import copy

import torch
from networks import randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.graph.lifted import rewritten

IMAGE = torch.randn(2, 4, 7, 9)


def test_a_program_that_needs_no_rewrite_is_left_alone():
    program = qf.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), (IMAGE,)).program
    assert rewritten(program, lambda graph: None) is program


class Counter(nn.Module):
    """State that the program writes to, an input that is a number, and a norm to fold."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, input, scale: float):
        self.calls.add_(1)
        return self.norm(self.conv(input)) * scale + self.calls


def test_state_and_inputs_stay_and_the_stages_before_are_unchanged():
    model = randomize_statistics(Counter()).eval()
    exported = qf.export(copy.deepcopy(model), (IMAGE, 2.0))
    core = exported.to_core_aten()
    code, names = str(core.program.graph), set(exported.program.state_dict)
    program = core.to_edge("xnnpack").to_executorch()
    for _ in range(2):
        assert torch.allclose(program(IMAGE, 2.0), model(IMAGE, 2.0), atol=1e-4)
    assert str(core.program.graph) == code
    assert "batch_norm" in code
    assert set(exported.program.state_dict) == names
