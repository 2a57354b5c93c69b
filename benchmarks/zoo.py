"""Torchvision's models through float export, PTQ and QAT to a ``.pte`` that runs: one per family, or all.

    python benchmarks/zoo.py                            # one model per family
    python benchmarks/zoo.py --all --jobs 2             # every classification, segmentation and video model
    python benchmarks/zoo.py --models mobilenet_v3_small efficientnet_b0 --stock --recover

Weights are random, also those of a head that torchvision initializes to zero; batch norm statistics come from data (crops of
scikit-learn's two photographs). PTQ is calibrated on 32 images, with ``--recover`` also recovered, and compared with float on
eight others. Each model runs in a separate process and writes its result immediately; existing results are not computed again
(``--fresh`` does). Figures named ``.pte`` ran on the ExecuTorch runtime. Prints a table and writes JSON and markdown.

``planned calls`` is the plan's forecast of delegate calls, ``calls`` their number in the lowered program. ``int8`` is the share
of multiply-accumulates of convolutions and linear layers with quantized inputs and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision import models
from zoo_measure import crops, measured, with_statistics
from zoo_table import main

FAMILIES = (
    *("alexnet", "vgg11_bn", "resnet18", "squeezenet1_1", "densenet121", "inception_v3", "googlenet"),
    *("shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "regnet_y_400mf", "efficientnet_b0"),
    *("convnext_tiny", "vit_b_16", "swin_t", "maxvit_t"),
    *("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large", "r3d_18"),
)


def run(name: str, modes: list[str], stock: bool, recover: bool) -> dict[str, Any]:
    """All measurements of the model ``name``."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights_backbone": None} if name.startswith(("deeplab", "fcn", "lraspp")) else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True}
    video = name in models.list_models(models.video)
    side = 299 if name == "inception_v3" else 224
    batch = crops((3, 8, 64, 64) if video else (3, side, side))
    model = with_statistics(models.get_model(name, weights=None, **options), batch)
    return measured(name, model, batch, modes, stock, recover)


def every() -> Sequence[str]:
    rooms = (models, models.segmentation, models.video)
    return [name for room in rooms for name in models.list_models(room) if "quantized" not in name]


if __name__ == "__main__":
    main(__file__, __doc__, FAMILIES, every, run, Path("benchmarks/results/zoo"))
