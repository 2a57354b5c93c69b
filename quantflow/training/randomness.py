"""Random states of all generators: a resumed training draws the same numbers as an uninterrupted one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python."""
    torch.manual_seed(seed % 2**64)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator, as uint8 tensors."""
    state = {"torch": torch.get_rng_state()}
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        state[f"cuda{device}"] = torch.cuda.get_rng_state(device)
    _kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    state["numpy_rest"] = torch.tensor([position, has_gauss, gauss], dtype=torch.float64)
    _version, internal, gauss_next = random.getstate()
    state["python"] = torch.tensor(internal, dtype=torch.int64)
    state["python_gauss"] = torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64)
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore every generator to a state that :func:`random_state` returned. States of absent GPUs are ignored."""
    torch.set_rng_state(state["torch"])
    for device in range(torch.cuda.device_count()):
        if f"cuda{device}" in state:
            torch.cuda.set_rng_state(state[f"cuda{device}"], device)
    position, has_gauss, gauss = state["numpy_rest"].tolist()
    keys: Any = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    gauss_next = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss_next[0] if gauss_next else None))
