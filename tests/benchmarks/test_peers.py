"""The stock stack, as benchmarks compare with it."""

import sys
from pathlib import Path

import torch
from torch import nn
from torchao.quantization.pt2e import MinMaxObserver, ObserverBase, PerChannelMinMaxObserver

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import peers


def test_stock_min_max_looks_at_extremes_alone():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(1, 3, 8, 8)
    prepared = peers.stock_prepared(model.eval(), (x,), min_max=True)
    batches = [torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)]  # of any size
    peers.stock_calibrate(prepared, batches)
    observers = [m for m in prepared.modules() if isinstance(m, ObserverBase)]
    assert {type(m) for m in observers} == {MinMaxObserver, PerChannelMinMaxObserver}
    lowest = min(float(batch.min()) for batch in batches)
    assert any(float(m.min_val) == lowest for m in observers if type(m) is MinMaxObserver)
