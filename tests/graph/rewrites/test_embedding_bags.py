"""Bags of embeddings on the float path."""

import pytest
import torch
from float_path import same
from torch import nn


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 2}, {"include_last_offset": True}], ids=str)
def test_bags_of_embeddings(mode, settings):
    offsets = torch.tensor([0, 3, 3, 5])  # the second bag is empty
    assert same(nn.EmbeddingBag(10, 5, mode=mode, **settings), torch.tensor([1, 2, 4, 5, 2, 3, 9]), offsets)
