"""Activations on the float path."""

import torch
from float_path import Function, same
from torch.nn import functional as F

IMAGE = torch.randn(2, 4, 7, 9)


def test_an_elu_whose_alpha_is_left_out():
    assert same(Function(lambda x: F.elu_(x * 2) * 3), IMAGE)
