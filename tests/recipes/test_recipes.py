"""The recipes run as a person runs them, on small data, and refuse bad input before any work is lost."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from labelled_images import labelled_images, noise
from torchvision import models

import quantflow as qf

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
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
    return labelled_images(tmp_path / "images", 12, noise)


def test_qat_recipe(run):
    options = {
        "model": "regnet_x_400mf",
        "image_size": 32,
        "float_epochs": 4,
        "calibration_images": 64,
        "epochs": 1,
        "device": "cpu",
        "lr": 0.02,
        "batch_size": 64,
        "labels": None,
    }
    result, folder = run("qat_mobilenet", **options)
    assert result.keys() >= FIGURES | {"pte_float_agreement", "ptq_pte_float_agreement"}
    assert result["kept"] in ("PTQ", "QAT")
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
    torch.manual_seed(0)
    weights = tmp_path / "squeezenet.pth"
    torch.save(models.squeezenet1_1(num_classes=12).state_dict(), weights)
    options = {
        "model": "squeezenet1_1",
        "weights": weights,
        "calibration": images,
        "validation": images,
        "image_size": 32,
        "calibration_images": 8,
        "batch_size": 5,
        "output": tmp_path / "run",
    }
    result, folder = run("ptq_imagenet", **options)
    assert result["calibration_images"] == 8
    assert result["validation_images"] == 12
    assert result["delegated_fraction"] == 1.0
    assert result["pte_sqnr_against_converted_db"] > 15
    program = (folder / "model.pte").read_bytes()
    assert qf.Program.from_buffer(program)(torch.randn(1, 3, 32, 32)).shape == (1, 12)
    run("ptq_imagenet", **options, resume=None)
    assert (folder / "model.pte").read_bytes() == program
    torch.save(models.squeezenet1_1(num_classes=12).state_dict(), weights)
    with pytest.raises(SystemExit, match="other weights"):
        run("ptq_imagenet", **options, resume=None)
    with pytest.raises(SystemExit, match=r"other weights|another network or observer"):
        run("ptq_imagenet", **options, resume=None, skip="classifier.1")
    with pytest.raises(SystemExit, match="Remedy"):
        run("ptq_imagenet", **{**options, "output": tmp_path / "new"}, resume=None)


TEXT = {"length": 36, "train_snippets": 200, "held_out_snippets": 20, "depth": 1, "epochs": 2}


@pytest.mark.filterwarnings("ignore:.*left to portable kernels:quantflow.QuantflowWarning")  # as the embedding is
def test_text_recipe(run):
    result, folder = run("ptq_text", **TEXT)
    assert result["float_accuracy"] > 0.3  # six classes
    assert result["agreement_with_float"] >= 0.95
    assert result["logit_sqnr_db"] > 20
    assert result["pte_bytes"] <= 0.5 * result["float_bytes"]
    logits = qf.load(folder / "model.pte")(torch.randint(256, (1, 36)))
    assert logits.shape == (1, 6)


def test_text_recipe_reads_folders(run, tmp_path):
    for language, words in {"one": "uno due tre ", "two": "eins zwei drei "}.items():
        (tmp_path / "texts" / language).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "texts" / language / f"{i}.txt").write_text(words * 50)
    with pytest.warns(qf.QuantflowWarning, match="portable"):
        result, _ = run("ptq_text", data=tmp_path / "texts", width=48, **TEXT)
    assert result["pte_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 32}, "no whole number of tokens"),
        ({"data": "missing"}, "no such data"),
        ({"length": 6 * 10**7}, "too little text"),
    ],
)
def test_text_recipe_refuses(run, options, words):
    with pytest.raises(SystemExit, match=words) as caught:
        run("ptq_text", **options)
    assert "Remedy" in str(caught.value)


def test_no_held_out_text_was_trained_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))
    from text_data import text_data

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):  # each file is one byte over and over
            (tmp_path / name / f"{i:02}").write_bytes(bytes([65 + i]) * 100)
    data = text_data(str(tmp_path), 8, 300, 300, seed=0)
    for label in (0, 1):
        train, held_out = (
            set(part.tensors[0][part.tensors[1] == label].unique().tolist()) - {ord("\n")}
            for part in (data.train, data.held_out)
        )
        assert len(train) == 15
        assert len(held_out) == 5
        assert not train & held_out


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
