"""Image data sets for commands and recipes: scikit-learn's digits, torchvision data sets, image folders, ``labels.csv``."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, Subset, TensorDataset, random_split
from torchvision import datasets
from torchvision.transforms import v2

from quantflow.errors import QuantflowError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageData:
    """Images, float32 [3, size, size], each with an integer label.

    Attributes:
        train: Images for training and calibration.
        held_out: Images for scoring.
        classes: The number of classes; None where labels are those of the network, as in a ``labels.csv``.
    """

    train: Dataset
    held_out: Dataset
    classes: int | None


def digits(image_size: int, seed: int) -> ImageData:
    """scikit-learn's handwritten digits (1,797 images of 8×8), upsampled; a quarter is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    pixels = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(pixels, size=image_size, mode="bilinear").expand(-1, 3, -1, -1)
    images = v2.functional.normalize(images.contiguous(), IMAGENET_MEAN, IMAGENET_STD)
    labels = torch.from_numpy(raw.target)
    train, held_out = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    return ImageData(TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out]), 10)


def preprocessing(
    image_size: int,
    *,
    resize: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Any], torch.Tensor]:
    """Resize the shorter side to 256/224 of the size (optional), center crop, scale to 0..1 and normalize."""
    steps: list[Callable] = [v2.ToImage()]
    if resize:
        steps.append(v2.Resize(image_size * 256 // 224, antialias=True))
    steps += [v2.CenterCrop(image_size), v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(mean, std)])


def image_data(
    name: str, root: Path, image_size: int, seed: int, validation: str | None = None, *, resize: bool = True
) -> ImageData:
    """``"digits"``, a folder of images, or a torchvision data set by name.

    A folder has one folder a class or a ``labels.csv``, or has such folders ``train`` and ``val`` inside. A folder
    ``validation`` is held out in place of a part of the images. Without ``resize`` images are cropped only.
    """
    transform = preprocessing(image_size, resize=resize)
    if validation is not None:
        found = image_data(name, root, image_size, seed, resize=resize)
        return replace(found, held_out=labelled_folder(Path(validation), transform))
    if name == "digits":
        return digits(image_size, seed)
    if Path(name).is_dir():
        return _from_folder(Path(name), transform, seed)
    kind = getattr(datasets, name, None)
    if kind is None:
        remedy = "digits, an existing folder with one folder a class, or a data set of torchvision.datasets"
        raise QuantflowError("data", "no such data", node=f"--data {name}", remedy=remedy)
    try:
        by_split = "train" not in inspect.signature(kind).parameters
        parts: Sequence[dict[str, object]] = (
            [{"split": "train"}, {"split": "test"}] if by_split else [{"train": True}, {"train": False}]
        )
        train, held_out = (kind(str(root), download=True, transform=transform, **part) for part in parts)
    except (AttributeError, TypeError, RuntimeError, OSError) as error:
        remedy = "put the files under --data-root by hand; it must be a classification data set with a test part"
        reason = f"can't be downloaded or read: {error}"
        raise QuantflowError("data", reason, node=f"--data {name}", remedy=remedy) from error
    return ImageData(train, held_out, len(train.classes))


def _from_folder(folder: Path, transform: Callable[[Any], torch.Tensor], seed: int) -> ImageData:
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train, held = (labelled_folder(folder / part, transform) for part in ("train", "val"))
    else:
        train, held = held_out(labelled_folder(folder, transform), 0.2, seed)
    whole = train.dataset if isinstance(train, Subset) else train
    return ImageData(train, held, len(whole.classes) if isinstance(whole, datasets.ImageFolder) else None)


def held_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """A random ``share`` of the images, and before it the others."""
    first_part, second = random_split(dataset, [1 - share, share], torch.Generator().manual_seed(seed))
    return first_part, second


class LabelledImages(Dataset):
    """The images that a ``labels.csv`` (columns ``file,label``) lists, in its order."""

    def __init__(self, folder: Path, transform: Callable[[Any], torch.Tensor]) -> None:
        with open(folder / "labels.csv", newline="") as file:
            self.rows = [(folder / row["file"], int(row["label"])) for row in csv.DictReader(file)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.rows[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB")), label
        except (OSError, UnidentifiedImageError) as error:
            raise QuantflowError("data", str(error), node=str(path), remedy="remove or replace the file") from error


def labelled_folder(folder: Path, transform: Callable[[Any], torch.Tensor]) -> Dataset:
    """The images of a folder with ``labels.csv``, or with one folder per class."""
    try:
        if (folder / "labels.csv").is_file():
            return LabelledImages(folder, transform)
        return datasets.ImageFolder(str(folder), transform)
    except (OSError, KeyError, ValueError) as error:
        remedy = "a folder with images and labels.csv (file,label), or one folder a class"
        reason = f"not a folder of labelled images: {type(error).__name__}: {error}"
        raise QuantflowError("data", reason, node=str(folder), remedy=remedy) from error


def count_of(dataset: Dataset) -> int:
    """The number of images; a ``Dataset`` declares no length."""
    return len(cast(Sized, dataset))


def first(dataset: Dataset, count: int | None) -> Dataset:
    """The first ``count`` images, or all."""
    size = count_of(dataset)
    return dataset if count is None or count >= size else Subset(dataset, range(count))
