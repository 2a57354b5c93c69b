"""The benchmarks measure what they say: planted differences, memory and failures show up in their figures."""

import argparse
import csv
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchao.quantization.pt2e import MinMaxObserver, ObserverBase, PerChannelMinMaxObserver
from torchvision import models

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import accuracy
import calibration
import peers
from fresh_process import in_fresh_process, peak_growth
from record import write_record

import quantflow as qf


def test_a_fresh_process_answers_or_fails_as_its_function_does():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        in_fresh_process(int, "no number")


def test_peak_growth_sees_what_is_freed_again():
    size = 64 * 2**20
    assert size <= peak_growth(lambda: bytearray(b"1" * (size // 2)) * 2) < 4 * size
    assert peak_growth(lambda: None) < size / 16


def test_a_record_keeps_no_folders(tmp_path):
    path = tmp_path / "new" / "figures.json"
    options = argparse.Namespace(json=path, data=tmp_path / "images", weights=[tmp_path / "a.pth"], size=3)
    write_record(path, options, [{"ratio": 1.0}])
    text = path.read_text()
    assert str(tmp_path) not in text
    assert '"images"' in text
    assert '"a.pth"' in text


def test_stock_min_max_looks_at_extremes_alone():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(1, 3, 8, 8)
    prepared = peers.stock_prepared(model.eval(), (x,), min_max=True)
    batches = [torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)]  # of any size
    peers.stock_calibrate(prepared, batches)
    observers = [m for m in prepared.modules() if isinstance(m, ObserverBase)]
    assert {type(m) for m in observers} == {MinMaxObserver, PerChannelMinMaxObserver}
    lowest = min(float(batch.min()) for batch in batches)
    assert any(float(m.min_val) == lowest for m in observers if type(m) is MinMaxObserver)


@pytest.fixture
def options(tmp_path):
    """Sixteen images, as the accuracy benchmark takes them."""
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        for i in range(16):
            coarse = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8).numpy()
            Image.fromarray(coarse).resize((40, 40)).save(tmp_path / f"{i}.png")
            writer.writerow([f"{i}.png", i % 10])
    return argparse.Namespace(
        calibration=tmp_path, validation=tmp_path, image_size=32, resize=False, batch_size=5, limit=12
    )


def small_network(*_):
    layers = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)]
    return nn.Sequential(*layers).eval(), accuracy.preprocessing(32, resize=False)


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
    assert all(isinstance(accuracy.cell(row, column), str) for row in rows for column in accuracy.COLUMNS)


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


def test_calibration_counts_batches_and_takes_float_for_one(monkeypatch):
    monkeypatch.setattr(calibration, "MEMORY_BATCHES", ())  # a process for each would take a minute
    monkeypatch.setattr(calibration, "VARIANTS", {k: calibration.VARIANTS[k] for k in ("float", "quantflow")})
    rows = calibration.measure(
        argparse.Namespace(model="squeezenet1_1", batch_size=2, batches=3, image_size=64, repeats=2)
    )
    assert rows["float"]["ratio"] == 1
    assert rows["float"]["batches"] == 3
    assert 1 <= rows["quantflow"]["batches"] <= 3
    assert rows["quantflow"]["calibrate_s"] > 0
    assert rows["quantflow"]["convert_s"] > 0
