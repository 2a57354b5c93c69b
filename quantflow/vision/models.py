"""Torchvision classifiers with weights by name or from a file, and exported programs from files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torchvision import models

from quantflow.errors import QuantflowError


def classifier(name: str, classes: int | None, weights: str | None) -> nn.Module:
    """The torchvision model ``name``.

    Args:
        name: Its name in ``torchvision.models``.
        classes: Outputs of the last layer; None for those of the weights (1,000 without weights).
        weights: A torchvision weights name (``"DEFAULT"``, ``"IMAGENET1K_V1"``), a file with a state dict, or None for a
            random initialization. Layers whose shape differs because of ``classes`` are initialized randomly.

    Raises:
        QuantflowError: at stage ``"model"``, for an unknown model and for weights that are missing or of another model.
    """
    if name not in models.list_models(models):
        close = ", ".join(m for m in models.list_models(models) if m.startswith(name.split("_")[0]))
        remedy = f"one of: {close}" if close else "a name of torchvision.models"
        raise QuantflowError("model", "no such model in torchvision", node=f"--model {name}", remedy=remedy)
    state = None if weights is None else _state_dict(name, weights)
    model = models.get_model(name, weights=None, **({} if classes is None else {"num_classes": classes}))
    if state is None:
        return model
    head, own = list(model.state_dict().items())[-1]
    if classes is None and head in state and state[head].shape[:1] != own.shape[:1]:
        model = models.get_model(name, weights=None, num_classes=state[head].shape[0])
    load_weights(model, state, str(weights), fresh_head=classes is not None)
    return model


def covers(name: str, classes: int | None, weights: str) -> bool:
    """Whether ``weights`` hold all of the torchvision model ``name`` with ``classes`` outputs, its last layer too."""
    if classes is None:
        return True
    state, own = _state_dict(name, weights), models.get_model(name, weights=None, num_classes=classes).state_dict()
    return not _misfits(own, state)


def read_program(path: Path, *, trust: bool) -> ExportedProgram:
    """The exported program in the ``.pt2`` file ``path``.

    Args:
        path: A file that ``torch.export.save`` wrote.
        trust: Whether its source is trusted: opening the file can run code in it.

    Raises:
        QuantflowError: at stage ``"model"``, if the file is not trusted or can't be read.
    """
    node = f"--model {path}"
    if not path.is_file():
        raise QuantflowError("model", "no such file", node=node, remedy="a file that torch.export.save wrote")
    if not trust:
        reason = "opening a .pt2 file can run code that is in it"
        raise QuantflowError("model", reason, node=node, remedy="pass --trust if you know where it comes from")
    try:
        return torch.export.load(path)
    except Exception as error:
        reason = f"can't be read as an exported program: {_first_line(error)}"
        raise QuantflowError("model", reason, node=node, remedy="a file that torch.export.save wrote") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in the file ``path``, written by ``torch.save`` or safetensors. No code in the file runs.

    Raises:
        QuantflowError: at stage ``"model"``, if the file can't be read or has no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "check the path; the file is one that torch.save(model.state_dict(), path) wrote"
        reason = f"can't be read as weights: {_first_line(error)}"
        raise QuantflowError("model", reason, node=f"--weights {path}", remedy=remedy) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise QuantflowError("model", "holds no state dict", node=f"--weights {path}", remedy="save model.state_dict()")
    return state


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _state_dict(name: str, weights: str) -> dict[str, torch.Tensor]:
    path = Path(weights)
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or path.exists():
        return read_weights(path)
    try:
        return models.get_model_weights(name)[weights.upper()].get_state_dict(progress=True)
    except KeyError as error:
        known = [w.name for w in models.get_model_weights(name)]
        remedy = f"a file, or one of {known}"
        raise QuantflowError("model", "no such weights", node=f"--weights {weights}", remedy=remedy) from error
    except OSError as error:
        remedy = "download the file by hand and name it"
        raise QuantflowError(
            "model", f"download failed: {error}", node=f"--weights {weights}", remedy=remedy
        ) from error


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], weights: str, *, fresh_head: bool = False) -> None:
    """Load ``state`` into ``model``; errors name it ``weights``.

    Raises:
        QuantflowError: at stage ``"model"``, if the tensors do not fit ``model``; ``fresh_head`` excepts the last layer.
    """
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    misfits = _misfits(own, state)
    # --weights may have another number of classes: then the weight and the bias of the last layer do not fit.
    tolerated = 2 if fresh_head else 0
    if len(misfits) > tolerated or len(fits) < len(own) // 2:
        remedy = "name the weights of this model"
        reason = f"the weights of another model: {len(misfits)} tensors do not fit, first {misfits[0]}"
        raise QuantflowError("model", reason, node=f"--weights {weights}", remedy=remedy)
    model.load_state_dict(fits, strict=False)


def _misfits(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> list[str]:
    """The tensors of a model, ``own``, that ``state`` lacks or has in another shape; old files hold no batch counters."""
    names = [k for k in own if not k.endswith("num_batches_tracked")]
    return [k for k in names if k not in state or state[k].shape != own[k].shape]
