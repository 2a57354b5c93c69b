"""timm's models through float export, PTQ and QAT to a ``.pte`` that runs: a choice, or one of each family.

    python benchmarks/timm_zoo.py                       # some models of families that differ
    python benchmarks/timm_zoo.py --all                 # the smallest model of each family
    python benchmarks/timm_zoo.py --models nfnet_f0 beit_base_patch16_224 --stock

Needs ``pip install quantflow[timm]``. Weights are random, batch norm statistics come from data; see ``benchmarks/zoo.py`` for
the figures and the columns. Existing results are not computed again, so that a run can be resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from zoo_measure import crops, measured, with_statistics
from zoo_table import main

FAMILIES = (
    *("dm_nfnet_f0", "resnetv2_50x1_bit", "beit_base_patch16_224", "swinv2_tiny_window8_256", "levit_128s"),
    *(
        "efficientvit_b0",
        "xcit_nano_12_p16_224",
        "edgenext_xx_small",
        "ghostnet_050",
        "deit_tiny_patch16_224",
        "pvt_v2_b0",
    ),
    *("skresnet18", "ghostnetv2_100", "poolformer_s12", "tresnet_m", "mobilevitv2_050", "vit_base_patch16_224"),
)


def run(name: str, modes: list[str], stock: bool, recover: bool) -> dict[str, Any]:
    """All measurements of the model ``name``."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    batch = crops(tuple(model.default_cfg.get("input_size", (3, 224, 224))))
    return measured(name, with_statistics(model, batch), batch, modes, stock, recover)


def every() -> Sequence[str]:
    """The model with the fewest parameters of each module of timm."""
    names = []
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                try:
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
                except Exception:  # it computes with its weights when it is made
                    continue
        names += [min(sizes, key=lambda name: sizes[name])] if sizes else []
    return names


if __name__ == "__main__":
    main(__file__, __doc__, FAMILIES, every, run, Path("benchmarks/results/timm_zoo"))
