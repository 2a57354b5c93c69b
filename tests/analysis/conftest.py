"""A network with one layer that integers break."""

import pytest
import torch
from networks import Classifier


@pytest.fixture(scope="module")
def planted():
    """A network one of whose layers has in each row a weight that takes the levels of all others, and that nothing reads."""
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        model.first.weight[0] = 0
        model.first.bias[0] = -1  # an input of the planted layer that is always zero
        model.planted.weight[:, 0] = 300
    x = torch.randn(200, 16)
    return model, x, model(x).argmax(1)
