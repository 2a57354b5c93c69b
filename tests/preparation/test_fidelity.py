"""With rounding off, torchvision's networks prepared for QAT are the eager networks: outputs, gradients, statistics."""

import pytest
import torch
from networks import randomize_statistics
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

import quantflow as qf
from quantflow.observers.fake_quantize import FakeQuantize
from quantizers import XNNPACK_RULES, RuleQuantizer

pytestmark = pytest.mark.slow

FAMILIES = {
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "resnet18": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "regnet_y_400mf": {},
    "shufflenet_v2_x0_5": {},
}


def distance(ours, eager):
    return float((ours.double() - eager.double()).norm() / eager.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_off_is_eager(name):
    model = models.get_model(name, weights=None, num_classes=10, **FAMILIES[name]).double()
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0  # captured as in inference, see README
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps, module.momentum = module.eps * 3, 0.2
    randomize_statistics(model)
    model.train()
    x, target = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    prepared = qf.prepare(qf.export(model, (x,)).module(), RuleQuantizer(rules=XNNPACK_RULES), qat=True).train()
    fake_quantizers = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    assert len(fake_quantizers) > 20
    for module in fake_quantizers:
        module.enable_fake_quant(False)
    outputs = {}
    for key, network in (("ours", prepared), ("eager", model)):
        torch.manual_seed(2)
        output = network(x)
        nn.functional.cross_entropy(output, target).backward()
        outputs[key] = [output, network.eval()(x)]
    for ours, eager in zip(outputs["ours"], outputs["eager"], strict=True):
        assert distance(ours, eager) < 1e-5
    for key, parameter in model.named_parameters():
        # In double precision, so that only a wrong gradient differs; a bias before batch norm has none.
        difference = (prepared.get_parameter(key).grad - parameter.grad).norm()
        assert difference <= 1e-5 * parameter.grad.norm() + 1e-9, key
    for key, buffer in model.named_buffers():
        assert distance(prepared.get_buffer(key), buffer) < 1e-5, key
