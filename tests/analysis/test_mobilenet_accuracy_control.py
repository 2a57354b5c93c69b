"""The accuracy budget on MobileNetV3: few layers go back to float."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchvision import models

import quantflow as qf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mobilenet():
    """MobileNetV3-Small after 24 steps on digits, its last layer solved for, with one layer that integers break."""
    digits = load_digits()
    pixels = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 8 - 1, size=32, mode="bilinear")
    images, labels = pixels.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target)
    model = models.mobilenet_v3_small(num_classes=10).double()  # in float32 each processor would train another network
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=24)
    for index in torch.randint(1397, (24, 64)):
        F.cross_entropy(model(images[index].double()), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.float()
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the mean over what follows
            norm.reset_running_stats()
        for part in images[:512].split(256):
            model(part)
        # A layer with a weight in each row that takes the levels of all others, and that nothing reads.
        norm, planted, head = model.eval().features[12][1], model.classifier[0], model.classifier[3]
        norm.weight[0], norm.bias[0] = 0, -4
        read = model.classifier[:3](model.avgpool(model.features(images[:1397])).flatten(1)).double()
        read = torch.cat([read, torch.ones(len(read), 1)], 1)
        gram = read.T @ read + len(read) * 1e-3 * torch.eye(read.shape[1])
        solved = torch.linalg.solve(gram, read.T @ F.one_hot(labels[:1397], 10).double()).float()
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
        planted.weight[:, 0] = 20
    return model, images, labels


def test_mobilenet_v3_meets_its_budget_with_few_layers_in_float(mobilenet):
    model, images, labels = mobilenet
    held_out = list(zip(images[1397:1597].split(50), labels[1397:1597].split(50), strict=True))
    with torch.no_grad():
        assert sum(int((model(x).argmax(1) == y).sum()) for x, y in held_out) > 0.7 * 200
    data = [images[:16]]
    result = qf.quantize(model, (images[:1],), data, recover=False, max_drop=0.005, validation=held_out, progress=False)
    budget = result.report.accuracy_control
    assert budget.holds
    assert budget.drop <= 0.005
    assert budget.tried[0][1] > 0.1
    assert "classifier.0" in [layer.layer for layer in budget.reverted]
    assert len(budget.reverted) <= 3
