"""Text data for the recipes: source code of installed packages, or one folder of text files per class."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset, TensorDataset

from quantflow import QuantflowError

# Languages, and the folders of installed packages with many files of each. Three of the languages are similar.
LANGUAGES = {
    "Python": ("numpy", "py"),
    "Python stub": ("numpy", "pyi"),
    "Cython": ("sklearn", "pyx"),
    "C++": ("torch", "h"),
    "CMake": ("torch", "cmake"),
    "YAML": ("executorch", "yaml"),
}
MOST_FILES, MOST_BYTES = 200, 20_000  # limits per class and per file, so that none dominates


@dataclass(frozen=True)
class TextData:
    """Training and held-out snippets: bytes as int64 [length], each with an integer label."""

    train: Dataset
    held_out: Dataset
    classes: tuple[str, ...]


def text_data(name: str, length: int, train_count: int, held_out_count: int, seed: int) -> TextData:
    """Snippets of ``length`` bytes, equally many of each class, from ``"languages"`` or from the folder ``name``.

    A quarter of the files is held out, so that no held-out snippet comes from a training file.

    Raises:
        QuantflowError: at stage ``"recipe"``, if ``name`` is not a folder or a class has too little text.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[torch.Tensor]] = {"train": [], "held out": []}
    labels: dict[str, list[torch.Tensor]] = {"train": [], "held out": []}
    classes = _languages() if name == "languages" else _folders(Path(name))
    for label, (class_name, files) in enumerate(classes.items()):
        random.Random(seed).shuffle(files)
        files = files[:MOST_FILES]
        split = len(files) * 3 // 4
        for part, of_part, count in (
            ("train", files[:split], train_count),
            ("held out", files[split:], held_out_count),
        ):
            text = b"\n".join(file.read_bytes()[:MOST_BYTES] for file in of_part)
            if len(text) <= length:
                remedy = f"at least 2 files, each of more than {length} bytes"
                raise QuantflowError("recipe", f"too little text ({part})", node=class_name, remedy=remedy)
            starts = torch.randint(len(text) - length, (count, 1), generator=generator)
            parts[part].append(torch.frombuffer(bytearray(text), dtype=torch.uint8)[starts + torch.arange(length)])
            labels[part].append(torch.full((count,), label))
    sets = {part: TensorDataset(torch.cat(parts[part]).long(), torch.cat(labels[part])) for part in parts}
    return TextData(sets["train"], sets["held out"], tuple(classes))


def _languages() -> dict[str, list[Path]]:
    found = {}
    for language, (package, suffix) in LANGUAGES.items():
        spec = find_spec(package)
        roots = [Path(root) for root in (spec.submodule_search_locations if spec else None) or ()]
        found[language] = sorted(file for root in roots for file in root.rglob(f"*.{suffix}") if file.stat().st_size)
    return found


def _folders(root: Path) -> dict[str, list[Path]]:
    classes = {f.name: sorted(p for p in f.rglob("*") if p.is_file()) for f in sorted(root.glob("*")) if f.is_dir()}
    if len(classes) < 2:
        reason, remedy = "no such data", "languages, or a folder with one folder of text files a class"
        raise QuantflowError("recipe", reason, node=f"--data {root}", remedy=remedy)
    return classes
