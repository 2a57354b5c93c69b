"""The float model of a command: with given weights, from a file, or trained by the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils.data import DataLoader, Dataset

import quantflow as qf
from quantflow.cli.chosen_images import ChosenImages
from quantflow.errors import QuantflowError
from quantflow.files import write_atomically
from quantflow.malloc import keep_freed_memory
from quantflow.signature.signature import DynamicDim, Signature
from quantflow.vision import images, models

Network: TypeAlias = nn.Module | ExportedProgram
_EPOCHS = 9  # the default for training from scratch


def is_program(model: str) -> bool:
    """Whether ``--model`` names a file, not a torchvision model."""
    return model.endswith(".pt2")


def read(model: str, weights: str | None, classes: int | None, *, trust: bool) -> Network:
    """The model of ``--model``, in inference mode; ``classes`` as in :func:`quantflow.vision.models.classifier`.

    Raises:
        QuantflowError: at stage ``"model"``.
    """
    if not is_program(model):
        return models.classifier(model, classes, weights).eval()
    if weights is not None:
        remedy = "name a torchvision model, or leave --weights out: the file holds its own"
        raise QuantflowError("model", "weights for a .pt2 file", node=f"--weights {weights}", remedy=remedy)
    return models.read_program(Path(model), trust=trust)


@dataclass(frozen=True)
class FloatModel:
    """A float model and its inputs.

    Attributes:
        network: The model.
        example: Zeros, for one image or for the fixed batch size of an exported program.
        rows: The fixed batch size; None for any.
    """

    network: Network
    example: tuple[torch.Tensor]
    rows: int | None = None

    @classmethod
    def of(cls, network: Network, size: int) -> FloatModel:
        """``network`` with an example of ``size`` × ``size`` pixels.

        Raises:
            QuantflowError: at stage ``"model"``, for a program whose input is not a batch of images of this size.
        """
        if not isinstance(network, ExportedProgram):
            return cls(network, (torch.zeros(1, 3, size, size),))
        inputs = Signature.of_program(network).inputs
        shape = inputs[0].shape if len(inputs) == 1 else ()
        if len(shape) != 4 or shape[1] != 3:
            reason = f"takes {', '.join(map(str, inputs))}, no batch of images"
            raise QuantflowError("model", reason, node="--model", remedy="use qf.quantize(model, ...) in Python")
        if not isinstance(shape[3], DynamicDim) and shape[3] != size:
            reason, remedy = f"takes images of {shape[3]} pixels a side", f"--image-size {shape[3]}"
            raise QuantflowError("model", reason, node="--model", remedy=remedy)
        rows = shape[0] if isinstance(shape[0], int) else None
        return cls(network, (torch.zeros(rows or 1, 3, size, size),), rows)

    def calibration(self, dataset: Dataset, most: int | None, batch_size: int) -> DataLoader:
        """The first ``most`` images of ``dataset``, or all, in batches that fit the model."""
        return DataLoader(images.first(dataset, most), self.rows or batch_size, drop_last=self.rows is not None)


def float_model(
    model: str,
    weights: str | None,
    trust: bool,
    chosen: ChosenImages,
    *,
    float_epochs: int | None,
    lr: float,
    save_float: Path | None,
) -> FloatModel:
    """The model of ``--model``, trained in float on ``--data`` if requested or if it has no weights.

    Raises:
        QuantflowError: at stage ``"model"`` if it can't be read; at ``"data"`` if there are no data to train it on.
    """
    data = chosen.to_learn
    classes = None if data is None else data.classes
    trained = is_program(model) or (weights is not None and models.covers(model, classes, weights))
    epochs = float_epochs if float_epochs is not None else 0 if trained else _EPOCHS
    if epochs and chosen.data is None:
        remedy = "--weights FILE, or --data to train it on"
        raise QuantflowError("data", "no weights, and nothing to train on", node=f"--model {model}", remedy=remedy)
    torch.manual_seed(chosen.seed)
    network = read(model, weights, classes, trust=trust)
    found = FloatModel.of(network, chosen.size)
    if epochs and data is not None:
        found = FloatModel(
            _trained(found, loader_of(data.train, chosen.batch_size), epochs, lr, chosen.seed), found.example
        )
    if save_float is not None:
        _save_weights(found.network, save_float)
    return found


def loader_of(dataset: Dataset, batch_size: int) -> DataLoader:
    """Shuffled training batches, in an order that the seed of the training loop determines."""
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=torch.Generator())


def _trained(start: FloatModel, loader: DataLoader, epochs: int, lr: float, seed: int) -> qf.TrainableGraphModule:
    keep_freed_memory()
    graph = qf.export(start.network, start.example, dynamic_batch=True).module()
    optimizer = torch.optim.SGD(graph.parameters(), lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    qf.train(graph, loader, epochs=epochs, optimizer=optimizer, scheduler=scheduler, seed=seed)
    return graph.eval()


def _save_weights(network: Network, path: Path) -> None:
    """Write safetensors, which are safe to read from untrusted sources."""
    from safetensors.torch import save

    state = network.state_dict if isinstance(network, ExportedProgram) else network.state_dict()
    held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    write_atomically(path, save(held), stage="output")
