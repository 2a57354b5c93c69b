"""A slice of the zoo: one network with everything that the stock path leaves in float, on the runtime."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

import quantflow as qf
from quantizers import XNNPACKQuantizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import zoo

pytestmark = pytest.mark.slow


def test_mobilenet_v3_is_integers_in_one_call():
    result = zoo.run("mobilenet_v3_small", ["ptq"], stock=False, recover=False)["modes"]["ptq"]
    assert result["stage"] == "runs", result
    assert (result["int8"], result["calls"], result["outside"], result["floating"]) == (1.0, 1, {}, {})
    assert result["planned calls"] == 1
    assert result["to_pte_db"] > 15


def test_plan_promises_integers_throughout():
    for name in ("mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_1", "alexnet"):
        model = models.get_model(name, weights=None)
        plan = XNNPACKQuantizer().plan(qf.export(model, (torch.zeros(1, 3, 224, 224),)).module())
        assert not plan.floating, str(plan)
        assert plan.calls == 1
