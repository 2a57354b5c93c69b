"""Folders of images with a ``labels.csv``."""

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image


def noise() -> Image.Image:
    """Random pixels, 36×40."""
    return Image.fromarray(torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8).numpy())


def coarse() -> Image.Image:
    """Nine random colours, smooth between them, 40×40."""
    return Image.fromarray(torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8).numpy()).resize((40, 40))


def labelled_images(folder: Path, count: int, image: Callable[[], Image.Image]) -> Path:
    """Write ``count`` images of ten classes into ``folder``, which is made if it does not exist, and return it."""
    folder.mkdir(exist_ok=True)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        for i in range(count):
            image().save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", i % 10])
    return folder
