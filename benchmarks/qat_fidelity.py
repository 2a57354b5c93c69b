"""Equalities that QAT should satisfy, checked for quantflow and stock PT2E on the same small networks.

    python benchmarks/qat_fidelity.py

With fake quantization off, a graph prepared for QAT should equal the eager network: outputs in training and in inference mode,
batch norm statistics after a step, and all of these again after train() → eval() → train(). With it on, the converted graph
should equal the prepared graph in inference mode. Figures are relative errors, ``‖ours - eager‖ / ‖eager‖``; a check fails
above 1e-4 (converted: 0.05). Writes JSON and prints one table.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peers import stock_quantizer
from torch import nn
from torchao.quantization.pt2e import (
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.fake_quantize import disable_fake_quant, enable_fake_quant
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from tqdm import tqdm

import quantflow as qf
from quantizers import XNNPACKQuantizer

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from networks import norm_networks, randomize_statistics

LAWS = ("train", "statistics", "eval", "train again", "converted")
LIMITS = dict.fromkeys(LAWS, 1e-4) | {"converted": 0.05}


def error(ours: torch.Tensor, eager: torch.Tensor) -> float:
    return float((ours.double() - eager.double()).norm() / eager.double().norm().clamp(min=1e-9))


def by_quantflow(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Callable, Callable]:
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(), qat=True)
    return prepared, lambda training: prepared.train(training), qf.convert


def by_stock(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Callable, Callable]:
    exported = torch.export.export(model.train(), (x,)).module()
    prepared = prepare_qat_pt2e(exported, stock_quantizer(qat=True))
    modes = {True: move_exported_model_to_train, False: move_exported_model_to_eval}
    return prepared, lambda training: modes[training](prepared), convert_pt2e


def laws(build: Callable, model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """The relative error of each check."""
    eager = copy.deepcopy(model).train()
    prepared, switch, convert = build(copy.deepcopy(model).train(), x)
    prepared.apply(disable_fake_quant)
    for module in prepared.modules():
        if isinstance(module, qf.FakeQuantize):
            module.enable_fake_quant(False)
    found = {}
    for law, training in (("train", True), ("eval", False), ("train again", True)):
        switch(training)
        eager.train(training)
        torch.manual_seed(0)
        ours = prepared(x).detach()
        torch.manual_seed(0)
        found[law] = error(ours, eager(x).detach())
        if law == "train":
            theirs, state = dict(eager.named_buffers()), prepared.state_dict()
            shared = [name for name in theirs if name in state and theirs[name].is_floating_point()]
            found["statistics"] = max([error(state[n], theirs[n]) for n in shared], default=0.0)
    prepared.apply(enable_fake_quant)
    for module in prepared.modules():
        if isinstance(module, qf.FakeQuantize):
            module.enable_fake_quant(True)
    prepared(x)
    switch(False)
    expected = prepared(x).detach()
    found["converted"] = error(convert(prepared)(x).detach(), expected)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/qat_fidelity.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    result: dict[str, dict[str, dict[str, float] | str]] = {}
    for name, (model, x) in tqdm(norm_networks().items(), desc="networks"):
        randomize_statistics(model)
        for tool, build in (("quantflow", by_quantflow), ("stock", by_stock)):
            try:
                result.setdefault(name, {})[tool] = laws(build, model, x)
            except Exception as failure:
                result.setdefault(name, {})[tool] = f"{type(failure).__name__}: {failure}".splitlines()[0][:90]
    print(f"{'':<26}{'':<11}" + "".join(f"{law:>12}" for law in LAWS))
    for name, tools in result.items():
        for tool, found in tools.items():
            if isinstance(found, str):
                print(f"{name:<26}{tool:<11}{found}")
                continue
            cells = (f"{found[law]:.1e}{'*' if found[law] > LIMITS[law] else ' '}" for law in LAWS)
            print(f"{name:<26}{tool:<11}" + "".join(f"{cell:>12}" for cell in cells))
    for tool in ("quantflow", "stock"):
        rows = [tools[tool] for tools in result.values()]
        broken = sum(isinstance(r, str) or any(r[law] > LIMITS[law] for law in LAWS) for r in rows)
        print(f"{tool}: a check fails (*) on {broken} of {len(rows)} networks")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
