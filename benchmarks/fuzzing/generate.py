"""Generation of a network from a seed: inputs, about a dozen operators, outputs."""

from __future__ import annotations

import random
import re

import torch
import torch.utils._pytree as pytree
from torch import nn

from fuzzing import idioms, layers, tensors  # noqa: F401  they register their operators
from fuzzing.builder import OPERATORS, Builder
from fuzzing.network import Network

_ATTEMPTS = 60
_SHRINKING = {"reduce", "part", "adaptive_pool", "integers", "softmax"}  # rare among the first statements
_FEWEST_ELEMENTS = 12
_WEIGHTS = re.compile(r"self\.(conv|linear|embedding|attention|up|encoder)\d")


def generate(seed: int) -> Network:
    """The network of ``seed``. It runs with finite outputs, and it trains."""
    for attempt in range(_ATTEMPTS):
        network = _grown(seed, random.Random(seed * 1_000 + attempt))
        if network is not None and runs(network):
            return network
    raise RuntimeError(f"seed {seed}: no network that runs in {_ATTEMPTS} attempts")


def runs(network: Network, training: bool = True) -> bool:
    """Whether the network trains, and runs three times in inference with finite outputs, one of which depends on an input."""
    try:
        model, batches = network.build()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = [_outputs(model, args, kwargs) for args, kwargs in batches]
        if not all(t.isfinite().all() for t in found[-1] if t.is_floating_point()):
            return False
        if training:
            with torch.random.fork_rng(devices=[]):
                model.train()
                for args, kwargs in network.build()[1][:2]:
                    loss = sum(t.square().mean() for t in _outputs(model, args, kwargs) if t.requires_grad)
                    if isinstance(loss, torch.Tensor):
                        loss.backward()
                        if not loss.isfinite():
                            return False
    except Exception:  # eager PyTorch may raise any type
        return False
    return True


def _outputs(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def _grown(seed: int, draw: random.Random) -> Network | None:
    b = Builder(seed, draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels_last = _inputs(b)
        depth = draw.randint(3, 12)
        for _ in range(depth * 3):
            if len(b.statements) >= depth:
                break
            _step(b, young=len(b.statements) < depth / 2)
    made = [n for s in b.statements for n in s.makes]
    if not made:
        return None
    outputs = [made[-1]]
    if b.chance(0.35):
        outputs += draw.choices([*made, *(i.name for i in b.inputs)], k=b.pick(1, 1, 2))
    structure = b.pick("tuple", "dict", "nested", "list") if len(outputs) > 1 else b.pick(*["one"] * 8, "tuple", "dict")
    network = b.network(outputs, structure, channels_last)
    # Dead statements that draw random numbers change torch's random state, so removing them would change the network.
    dead = set(network.statements) - set(network.pruned().statements)
    random_layers = ("drop", "depth", "encoder")
    draws = any(part in s.text for s in dead for part in random_layers)
    network = network.pruned() if draws or b.chance(0.7) else network
    weights = any(_WEIGHTS.search(s.text) for s in network.statements)
    return network if weights or b.chance(0.2) else None


def _step(b: Builder, young: bool) -> None:
    names = list(b.values)
    name = names[-1] if b.chance(0.75) else b.random.choice(names)
    value = b.values[name]
    kind = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int"
    fit = [o for o in OPERATORS.values() if value.ndim in o.ranks and o.kind == kind]
    if not fit:
        return
    weights = [o.weight * (0.15 if young and o.name in _SHRINKING else 1) for o in fit]
    before = dict(b.values), list(b.statements), dict(b.layers)
    if b.attempt(b.random.choices(fit, weights)[0], name):
        last = b.values[list(b.values)[-1]]
        if last.numel() < _FEWEST_ELEMENTS and b.chance(0.8):
            b.values, b.statements, b.layers = before


def _inputs(b: Builder) -> bool:
    """Draw the inputs; returns whether images and model are in ``channels_last``."""
    form = b.random.choices(("image", "line", "volume", "rows", "sequence", "tokens"), (9, 3, 2, 3, 4, 2))[0]
    batch, channels = b.pick(1, 2, 2, 3), b.pick(1, 3, 4, 4, 8)
    size = b.pick(5, 6, 8, 8, 9, 12)
    shape = {
        "image": f"{batch}, {channels}, {size}, {b.pick(size, size, 7)}",
        "line": f"{batch}, {channels}, {b.pick(8, 12)}",
        "volume": f"{b.pick(1, 2)}, {b.pick(1, 3, 4)}, 4, {b.pick(4, 5)}, 6",
        "rows": f"{b.pick(2, 3, 5)}, {b.pick(4, 8, 12)}",
        "sequence": f"{b.pick(2, 3)}, {b.pick(3, 5, 6)}, {b.pick(4, 8, 12)}",
        "tokens": f"{batch}, {b.pick(3, 5)}",
    }[form]
    if form == "tokens":
        b.input(f"torch.randint(0, 10, ({shape}))")
        return False
    channels_last = form == "image" and b.chance(0.15)
    layout = ".to(memory_format=torch.channels_last)" if channels_last else ""
    more = b.random.choices(("none", "same", "keyword", "tokens", "mask", "scalar"), (12, 2, 2, 1, 1, 1))[0]
    drawn = f"{b.pick('torch.randn', 'torch.randn', 'torch.rand')}({shape}){b.pick('', '', '', ' * 3 + 1', ' * 0.01')}"
    b.input(f"({drawn}){layout}" if layout else drawn)
    if more in ("same", "keyword"):
        b.input(f"torch.randn({shape}){layout}", keyword=more == "keyword")
    elif more == "tokens":
        b.input(f"torch.randint(0, 10, ({batch}, 4))", keyword=b.chance(0.5))
    elif more == "mask":
        b.input(f"torch.rand({shape}) > 0.5")
    elif more == "scalar":
        b.input("torch.rand(1)")
    first = next(iter(b.values))
    if list(b.values)[-1] != first:  # the network continues from the first input
        b.values[first] = b.values.pop(first)
    return channels_last
