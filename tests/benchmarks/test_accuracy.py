"""The benchmark of accuracy measures each stage, and outlives failures."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from labelled_images import coarse, labelled_images
from PIL import Image
from torch import nn
from torchvision import models

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import accuracy
from classifiers import cell

import quantflow as qf
from quantflow.vision.images import preprocessing

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tmp_path):
    """Sixteen images, as the accuracy benchmark takes them."""
    labelled_images(tmp_path, 16, coarse)
    return argparse.Namespace(
        calibration=tmp_path, validation=tmp_path, image_size=32, resize=False, batch_size=5, limit=12
    )


def small_network(*_):
    layers = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)]
    return nn.Sequential(*layers).eval(), preprocessing(32, resize=False)


def test_accuracy_measures_each_stage_and_outlives_a_failure(options, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(accuracy, "network", small_network)
    monkeypatch.setitem(accuracy.TOOLS, "nncf", fails)
    monkeypatch.setattr(accuracy, "find_spec", lambda _: object())
    options.tools = list(accuracy.TOOLS)
    rows = accuracy.measure("small", Path("none"), options)
    figures = {(row["tool"], row.get("on")): row for row in rows}
    assert figures["nncf", None]["error"] == "RuntimeError: no such operator"
    assert {row["images"] for row in rows if "images" in row} == {12}
    assert "drop" not in figures["float", "PyTorch"]
    for tool in ("stock", "quantflow"):
        converted, program = figures[tool, "converted"], figures[tool, ".pte"]
        assert program["bytes"] > 0
        assert converted["sqnr_db"] > 20
        assert abs(converted["sqnr_db"] - program["sqnr_db"]) < 3
    fake = figures["quantflow", "fake-quantized"]
    assert abs(fake["sqnr_db"] - figures["quantflow", "converted"]["sqnr_db"]) < 0.1
    four_bits = figures["quantflow W4A8", "converted"]
    assert four_bits["sqnr_db"] < figures["quantflow", "converted"]["sqnr_db"] - 6
    assert all(isinstance(cell(row, column), str) for row in rows for column in accuracy.COLUMNS)


def test_accuracy_says_that_nncf_is_missing(options, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "network", small_network)
    monkeypatch.setattr(accuracy, "find_spec", lambda _: None)
    options.tools = ["nncf"]
    rows = accuracy.measure("small", Path("none"), options)
    assert [row["tool"] for row in rows] == ["float"]
    assert "nncf: not installed, skipped" in capsys.readouterr().out


def test_efficientnet_lite_has_its_own_preprocessing(options, tmp_path):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = tmp_path / "lite0.pth"
    saved = package.EfficientNet.from_name("efficientnet-lite0")
    torch.save(saved.state_dict(), weights)
    model, transform = accuracy.network("efficientnet_lite0", weights, options)
    assert not model.training
    assert all(torch.equal(own, saved.state_dict()[name]) for name, own in model.state_dict().items())
    for value in (0, 127, 255):
        pixels = transform(Image.new("RGB", (32, 32), (value,) * 3))
        torch.testing.assert_close(pixels, torch.full((3, 32, 32), (value - 127) / 128))
    torch.save(models.squeezenet1_1().state_dict(), weights)
    with pytest.raises(qf.QuantflowError, match="weights of another model"):
        accuracy.network("efficientnet_lite0", weights, options)
