"""GridAdam moves weights in steps of their grid, whatever its scale, and freezes those that oscillate."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantflow.training.grid_adam import GridAdam, GridParameter


def optimizer_of(weight, step, lr=0.25, **options):
    return GridAdam([{"params": [GridParameter(weight, step, rounded=True)], "lr": lr}], **options)


def path(start, step, gradients, **options):
    """The values of a weight after each of ``gradients``."""
    weight, found = nn.Parameter(start.clone()), []
    optimizer = optimizer_of(weight, step, **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(-12, 12))
def test_the_path_in_steps_does_not_depend_on_the_scale(seed, exponent):
    random = torch.Generator().manual_seed(seed)
    start, gradients = torch.randn(3, 4, generator=random), torch.randn(6, 3, 4, generator=random)
    step = torch.rand(3, 1, generator=random) + 0.1
    factor = 2.0**exponent
    plain = path(start, step, gradients, freeze=0.3)
    assert torch.equal(path(start * factor, step * factor, gradients, freeze=0.3), plain * factor)


def test_it_is_adam_where_the_unit_is_one():
    start, gradients = torch.randn(5), torch.randn(8, 5)
    theirs = nn.Parameter(start.clone())
    adam = torch.optim.Adam([theirs], lr=0.25, betas=(0.9, 0.99))
    for gradient in gradients:
        theirs.grad = gradient.clone()
        adam.step()
    ours = path(start, torch.ones(()), gradients)[-1]
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)


def test_an_oscillating_weight_rests_at_the_mean_of_its_integers():
    # The gradient of the first weight turns at the middle of 0 and 1; that of the second one does not.
    weight = nn.Parameter(torch.tensor([0.6, 9.0]))
    optimizer = optimizer_of(weight, torch.ones(()), lr=0.02, freeze=0.05, betas=(0.0, 0.99))
    for _ in range(100):
        weight.grad = torch.tensor([1.0 if float(weight.detach()[0]) > 0.49 else -1.0, 1.0])
        optimizer.step()
    assert optimizer.frozen_share() == 0.5
    assert weight[0] in (0.0, 1.0)
    assert weight[1] < 9.0
    held = float(weight.detach()[0])
    weight.grad = torch.ones(2)
    optimizer.step()
    assert float(weight.detach()[0]) == held


def test_nothing_freezes_unless_asked():
    weight = nn.Parameter(torch.tensor([0.49]))
    optimizer = optimizer_of(weight, torch.ones(()), lr=0.1, betas=(0.0, 0.99))
    for i in range(50):
        weight.grad = torch.tensor([1.0 if i % 2 else -1.0])
        optimizer.step()
    assert optimizer.frozen_share() == 0.0
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_loaded_state_goes_on_alike():
    start, gradients, step = torch.randn(64), torch.randn(30, 64), torch.full((), 0.2)
    weight = nn.Parameter(start.clone())
    first = optimizer_of(weight, step, freeze=0.05, betas=(0.0, 0.99))
    for gradient in gradients[:15]:
        weight.grad = gradient.clone()
        first.step()
    other = nn.Parameter(weight.detach().clone())
    second = optimizer_of(other, step, freeze=0.05, betas=(0.0, 0.99))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[15:]:
        for w, optimizer in ((weight, first), (other, second)):
            w.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(weight, other)
    assert first.frozen_share() == second.frozen_share() > 0.0


def test_a_parameter_without_gradient_stays():
    weight = nn.Parameter(torch.ones(2))
    optimizer_of(weight, torch.ones(())).step()
    assert torch.equal(weight, torch.ones(2))
