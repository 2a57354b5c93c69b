"""Warm-up of torch and executorch before processes fork, so that initialization at first use happens once."""

from __future__ import annotations

import gc

import torch
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


def warm_up() -> None:
    """Export, quantize and lower a small network, in float and in integers.

    It does not use the runtime and backward passes: their threads do not survive a fork.
    """
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
        model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
        exported = qf.export(model, (x,))
        prepared = qf.prepare(exported.module(), XNNPACKQuantizer())
        qf.calibrate(prepared, [x], progress=False)
        for program in (exported, qf.export(qf.convert(prepared), (x,))):
            program.to_core_aten().to_edge("xnnpack").manager.to_executorch()
        qf.prepare(exported.module(), XNNPACKQuantizer(), qat=True).train()(x)
    gc.collect()
    gc.freeze()  # garbage collection in a child would write to, and so copy, all shared pages
