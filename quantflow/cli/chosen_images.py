"""The images of a command: for training, for calibration and for scoring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from quantflow.errors import QuantflowError
from quantflow.signature.signature import Signature
from quantflow.vision import images


@dataclass(frozen=True)
class ChosenImages:
    """The image options of the command line."""

    data: str | None
    data_root: Path
    validation: Path | None
    image_size: int | None
    resize: bool
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    most: int | None
    batch_size: int
    seed: int

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.image_size or (64 if self.data else 224)

    def fitting(self, signature: Signature) -> ChosenImages:
        """These images in the size of a program's input, unless ``--image-size`` was given."""
        shape = signature.inputs[0].shape if signature.inputs else ()
        width = shape[3] if len(shape) == 4 else None
        return self if self.image_size or not isinstance(width, int) else replace(self, image_size=width)

    @cached_property
    def to_learn(self) -> images.ImageData | None:
        """The images of ``--data``, for training."""
        if self.data is None:
            return None
        return images.image_data(self.data, Path(self.data_root), self.size, self.seed)

    def folder(self, path: Path) -> Dataset:
        """The labelled images in the folder ``path``."""
        mean, std = self.mean or images.IMAGENET_MEAN, self.std or images.IMAGENET_STD
        return images.labelled_folder(path, images.preprocessing(self.size, resize=self.resize, mean=mean, std=std))

    def to_calibrate(self, folder: Path | None) -> Dataset:
        """The calibration images: those in ``folder``, or the training part of ``--data``.

        Raises:
            QuantflowError: at stage ``"data"``, if neither is given.
        """
        if folder is not None:
            return self.folder(folder)
        if self.to_learn is None:
            remedy = "--calibration FOLDER, or --data"
            raise QuantflowError("data", "nothing to calibrate on", node="--calibration", remedy=remedy)
        return self.to_learn.train

    def to_score(self) -> DataLoader | None:
        """The images of ``--validation``, or the held-out part of ``--data``; None if neither is given."""
        labelled = self._labelled()
        return None if labelled is None else DataLoader(labelled, self.batch_size)

    def to_choose_and_score(self) -> tuple[DataLoader, DataLoader] | None:
        """The images of :meth:`to_score` in two random halves: layers are chosen by the first and scored on the second.

        Raises:
            QuantflowError: at stage ``"data"``, for a single image.
        """
        labelled = self._labelled()
        if labelled is None:
            return None
        size = images.count_of(labelled)
        if size < 2:
            remedy = "more images in --validation, --data or --images"
            raise QuantflowError("data", "one image can't be chosen by and scored on", node="--max-drop", remedy=remedy)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed)).tolist()
        halves = (Subset(labelled, sorted(half)) for half in (order[: size // 2], order[size // 2 :]))
        chosen, scored = (DataLoader(half, self.batch_size) for half in halves)
        return chosen, scored

    def _labelled(self) -> Dataset | None:
        if self.validation is not None:
            return images.first(self.folder(self.validation), self.most)
        return None if self.to_learn is None else images.first(self.to_learn.held_out, self.most)
