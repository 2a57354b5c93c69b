"""A digest of named tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 of ``text`` and of the names, dtypes, shapes and bytes of ``tensors``, independent of their order."""
    told = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        told.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return told.hexdigest()
