"""Training checkpoints on disk: written atomically, verified by a digest when read, and free of pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from quantflow.digest import digest
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.files import write_atomically

_PREFIX, _SUFFIX = "step-", ".safetensors"


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints of one training.

    Each checkpoint is one safetensors file: tensors, and in its header a JSON text and the digest of both. The last two are
    kept, so that there is a good one at any moment.

    Attributes:
        folder: The folder; it is made if need be.
        every: Steps between two checkpoints, 1 or more; one is written after each epoch besides.
        resume: Go on from the last good checkpoint in the folder, where there is one; otherwise start anew.

    Example:
        >>> import tempfile, torch
        >>> import quantflow as qf
        >>> graph = qf.export(torch.nn.Linear(8, 4), (torch.randn(2, 8),)).module()
        >>> data = [(torch.randn(2, 8), torch.tensor([0, 1])) for _ in range(3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = qf.Checkpoints(folder, every=2)
        ...     history = qf.train(graph, data, checkpoints=checkpoints, progress=False)
        ...     print([path.name for path in checkpoints.paths()])
        ['step-000000002.safetensors', 'step-000000003.safetensors']
    """

    folder: Path
    every: int = 200
    resume: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            remedy = "1 or more steps; one is written after each epoch besides"
            raise QuantflowError("train", f"every {self.every} steps is no interval", node="checkpoints", remedy=remedy)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, object]) -> Path:
        """Write the checkpoint of a step and remove all but the last two.

        Args:
            step: The number of steps done.
            tensors: The tensors by name, on any device.
            state: What JSON can hold.

        Returns:
            The path of the file.

        Raises:
            QuantflowError: at stage ``"train"``, when the file can't be written.
        """
        folder = Path(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "name a folder that can be written to"
            raise QuantflowError("train", f"can't write: {error}", node=str(folder), remedy=remedy) from error
        flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        text = json.dumps(state, sort_keys=True)
        data = save(flat, {"state": text, "digest": digest(flat, text)})
        path = write_atomically(folder / f"{_PREFIX}{step:09d}{_SUFFIX}", data, stage="train")
        for old in self.paths()[:-2]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """Return the checkpoints in the folder, oldest first."""
        return sorted(Path(self.folder).glob(f"{_PREFIX}*{_SUFFIX}"))

    def last_good(self, fingerprint: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Read the newest whole checkpoint of a training; a warning names each one that is passed over.

        Args:
            fingerprint: The digest that the training was saved with.

        Returns:
            Its tensors and its state; None where there is none.
        """
        for path in reversed(self.paths()):
            try:
                tensors, state = read_checkpoint(path)
            except QuantflowError as error:
                warnings.warn(
                    QuantflowWarning("train", error.reason, node=str(path), remedy=error.remedy), stacklevel=2
                )
                continue
            if state.get("fingerprint") == fingerprint:
                return tensors, state
            reason = "the checkpoint of another training (another graph, optimizer or set of options) is skipped"
            remedy = "use a folder of its own for each training"
            warnings.warn(QuantflowWarning("train", reason, node=str(path), remedy=remedy), stacklevel=2)
        return None


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the state that :meth:`Checkpoints.save` wrote.

    Raises:
        QuantflowError: at stage ``"train"``, for a file that is cut short, damaged, or no checkpoint.
    """
    remedy = "remove the file; the one before it is used"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        if "state" not in header or digest(tensors, header["state"]) != header.get("digest"):
            raise QuantflowError("train", "damaged, or no checkpoint of quantflow", node=str(path), remedy=remedy)
        return tensors, json.loads(header["state"])
    except (SafetensorError, OSError, ValueError) as error:
        raise QuantflowError("train", f"can't be read: {error}", node=str(path), remedy=remedy) from error
