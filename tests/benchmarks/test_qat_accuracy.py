"""The benchmark of QAT runs every method from the same float network, and goes on where it ended."""

import json
import sys
from pathlib import Path

import pytest
from labelled_images import coarse, labelled_images
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import qat_accuracy

from quantflow.vision.images import preprocessing

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """Images of ten classes, with labels."""
    return labelled_images(tmp_path / "images", 20, coarse)


def small_network(*_):
    layers = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(784, 10)).eval(), preprocessing(32, resize=False)


def test_every_method_is_scored_once(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(qat_accuracy, "network", small_network)
    record = tmp_path / "rows.json"
    folders = [text for name in ("calibration", "training", "validation") for text in (f"--{name}", str(folder))]
    given = ["--image-size", "32", "--batch-size", "4", "--epochs", "1", "--seeds", "0", "--json", str(record)]
    monkeypatch.setattr(sys, "argv", ["qat_accuracy.py", *folders, *given])
    qat_accuracy.main()
    rows = json.loads(record.read_text())["rows"]
    expected = {
        (m, s, on)
        for m in qat_accuracy.METHODS
        for s, on in (("w8a8", "converted"), ("w8a8", ".pte"), ("w4a8", "converted"))
    }
    assert {(row["method"], row["scheme"], row["on"]) for row in rows} == expected
    assert all(row["images"] == 20 and row["sqnr_db"] > 0 for row in rows)
    fidelity = {(row["method"], row["scheme"]): row["sqnr_db"] for row in rows if row["on"] == "converted"}
    assert fidelity["PTQ, recovered", "w4a8"] > fidelity["PTQ", "w4a8"]
    capsys.readouterr()
    qat_accuracy.main()  # nothing is left to measure
    assert json.loads(record.read_text())["rows"] == rows
    assert capsys.readouterr().out.startswith("| model |")
