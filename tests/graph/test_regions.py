"""Regions of a graph: what their bodies hold survives."""

import torch
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return torch.cond(x.sum() > 0, lambda y: y + torch.ones(4), lambda y: y - 1, (y,))


def test_constants_inside_branches_survive():
    x = torch.rand(2, 4)
    model = Branches().eval()
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    assert torch.allclose(prepared(x), model(x), atol=1e-6)


class AutocastOff(nn.Module):
    """Attention that asks for full precision, as EfficientViT does."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.project(x).chunk(3, -1)
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            scores = query.relu() @ (key.relu().mT @ value)
        return scores * scores.mean(-1, keepdim=True).expand_as(scores)


def test_what_a_region_computes_is_delegated_and_planned():
    model, x = AutocastOff().eval(), torch.randn(2, 6, 8)
    graph = qf.export(model, (x,)).module()
    assert XNNPACKQuantizer().plan(graph).calls == 1
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert not program.delegation.portable
    assert torch.allclose(program(x), model(x), atol=1e-5)
