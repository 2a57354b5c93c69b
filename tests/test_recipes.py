"""The recipes run as a person runs them, on small data, and refuse bad input before any work is lost."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import models

import quantflow as qf

RECIPES = Path(__file__).parent.parent / "recipes"
FIGURES = {
    "float_accuracy",
    "fake_quant_accuracy",
    "converted_accuracy",
    "pte_accuracy",
    "ptq_pte_accuracy",
    "float_bytes",
    "pte_bytes",
    "float_latency_ms",
    "pte_latency_ms",
    "pte_agreement",
    "delegated_fraction",
    "seconds",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))

    def run(recipe, **options):
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        arguments = [str(part) for pair in pairs for part in pair if part is not None]
        output = options.get("output", tmp_path / "run")
        if "output" not in options:
            arguments += ["--output", str(output)]
        monkeypatch.setattr(sys, "argv", [recipe, *arguments])
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
        return json.loads((output / "result.json").read_text()), output

    return run


@pytest.fixture
def images(tmp_path):
    """Twelve images in a folder with ``labels.csv``."""
    folder = tmp_path / "images"
    folder.mkdir()
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        for i in range(12):
            pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", i % 10])
    return folder


def test_qat_recipe(run):
    options = {
        "model": "resnet18",
        "image_size": 32,
        "float_epochs": 2,
        "epochs": 1,
        "device": "cpu",
        "lr": 0.02,
        "batch_size": 64,
        "distill": None,
    }
    result, folder = run("qat_mobilenet", **options)
    assert result.keys() >= FIGURES
    assert result["delegated_fraction"] == 1.0
    assert result["pte_bytes"] <= 0.32 * result["float_bytes"]
    assert result["float_accuracy"] > 0.3
    assert abs(result["pte_accuracy"] - result["converted_accuracy"]) <= 0.02
    assert result["pte_agreement"] >= 0.97
    program = (folder / "model.pte").read_bytes()
    assert len(program) == result["pte_bytes"]
    assert (folder / "history.png").read_bytes().startswith(b"\x89PNG")
    # Resumed at its end, the same bits.
    (folder / "model.pte").unlink()
    run("qat_mobilenet", **options, resume=None)
    assert (folder / "model.pte").read_bytes() == program


def test_ptq_recipe(run, images, tmp_path):
    weights = tmp_path / "resnet18.pth"
    torch.save(models.resnet18(num_classes=12).state_dict(), weights)
    result, folder = run(
        "ptq_imagenet",
        model="resnet18",
        weights=weights,
        calibration=images,
        validation=images,
        image_size=32,
        calibration_images=8,
        batch_size=5,
    )
    assert result["calibration_images"] == 8
    assert result["validation_images"] == 12
    assert result["delegated_fraction"] == 1.0
    assert result["pte_sqnr_against_converted_db"] > 15
    assert qf.load(folder / "model.pte")(torch.randn(1, 3, 32, 32)).shape == (1, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet99"}, "no such model"),
        ({"weights": "missing.pth"}, "can't be read"),
        ({"weights": "IMAGENET9K"}, "no such weights"),
        ({"data": "NoSuchData"}, "no such data"),
    ],
)
def test_qat_recipe_refuses(run, options, words):
    with pytest.raises(SystemExit, match=words) as caught:
        run("qat_mobilenet", **options)
    assert "Remedy" in str(caught.value)


def test_foreign_weights_are_named(run, tmp_path):
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="weights of another model"):
        run("qat_mobilenet", weights=tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(SystemExit, match="can't be read as weights"):
        run("qat_mobilenet", weights=tmp_path / "text.pth")


def test_an_output_that_can_not_be_written_is_found_first(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="can't write"):
        run("qat_mobilenet", output=tmp_path / "file" / "run")


def test_a_folder_without_images_is_named(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="not a folder of labelled images"):
        run("ptq_imagenet", calibration=tmp_path / "empty", validation=tmp_path / "empty", weights="DEFAULT")
