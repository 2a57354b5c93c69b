"""Memory layouts: models and examples in channels last lower to the same function, or are refused by name."""

import pytest
import torch
from networks import ConvNet, sqnr
from torch import nn

import quantflow as qf

IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("foreign", [False, True])
def test_channels_last_models_and_examples_lower_right(foreign):
    model = ConvNet().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    layouts = [p.stride() for p in model.parameters()]
    exported = qf.export(torch.export.export(model, (x,)) if foreign else model, (x,))
    assert [p.stride() for p in model.parameters()] == layouts
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    for given in (x, x.contiguous()):
        torch.testing.assert_close(program(given), model(given).detach(), rtol=1e-4, atol=1e-5)


def test_a_layout_changed_within_a_model_lowers_right():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x.contiguous(memory_format=torch.channels_last)).contiguous().flatten(1)

    model, x = Changing().eval(), torch.randn(2, 3, 8, 8)
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_channel_alone_in_channels_last_is_read_as_it_lies():
    """With one channel both layouts are contiguous, and their strides differ."""
    x = torch.randn(2, 1, 5, 7).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Linear(7, 12), nn.ReflectionPad2d(1), nn.Conv2d(1, 4, 3)).eval()
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert sqnr(model(x), program(x)) > 60


def test_shared_weights_in_channels_last_stay_one():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    model[2].weight = model[0].weight
    model.to(memory_format=torch.channels_last)
    graph = qf.export(model, (torch.randn(2, 4, 8, 8),)).module().train()
    assert len(list(graph.parameters())) == len(list(model.parameters())) == 3
    optimizer = torch.optim.SGD(graph.parameters(), 0.1)
    graph(torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    named = dict(graph.named_parameters(remove_duplicate=False))
    assert torch.equal(named["0.weight"], named["2.weight"])


def test_a_view_that_channels_last_alone_allows():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            return self.linear(x.permute(0, 2, 3, 1).view(-1, 3))

    model, x = Pixels(), IMAGE.to(memory_format=torch.channels_last)
    graph = qf.export(model, (x,)).module()
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(graph(x.contiguous()), model(x))


def test_strides_of_channels_last_are_refused():
    class Strided(nn.Module):
        def forward(self, x):
            return torch.as_strided(x, (128, 3), (3, 1)) * 2

    with pytest.raises(qf.QuantflowError, match="by strides") as raised:
        qf.export(Strided(), (IMAGE.to(memory_format=torch.channels_last),))
    assert raised.value.stage == "export"
