"""The commands that make and measure programs, from end to end; hostile files end in errors and run nothing."""

import json
import pickle

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import quantflow as qf
from quantflow.cli import main
from quantflow.cli.compare import Differences

pytestmark = pytest.mark.slow


def command(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def figures(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network for digits, as .pt2 for any batch, and what ``ptq`` made of it after three epochs."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)
    )
    torch.export.save(
        qf.export(network.eval(), (torch.zeros(2, 3, 16, 16),), dynamic_batch=True).program, folder / "net.pt2"
    )
    arguments = [
        "--model",
        folder / "net.pt2",
        "--trust",
        "--data",
        "digits",
        "--image-size",
        16,
        "--lr",
        0.1,
        "--json",
    ]
    result = command(
        "ptq",
        *arguments,
        "--float-epochs",
        3,
        "--output",
        folder / "net.pte",
        "--save-float",
        folder / "net.safetensors",
        "--report",
        folder / "report.html",
    )
    return folder, figures(result)


def test_ptq_writes_what_it_scored(made):
    folder, told = made
    float_, converted, pte = told["verification"]["stages"]
    assert (float_["kind"], converted["kind"], pte["kind"], pte["name"]) == ("float", "converted", ".pte", "net.pte")
    assert float_["metric"] > 0.9
    assert pte["outputs"][0]["agreement"] > 0.97
    assert told["delegated_fraction"] == 1.0
    assert pte["bytes"] == (folder / "net.pte").stat().st_size


def test_layers_are_not_chosen_on_what_is_reported(made, tmp_path, monkeypatch):
    """Which images choose and which are scored, as the evaluator and the verification see them."""
    folder, _ = made
    seen = {}
    evaluator, verify = qf.quantize.__globals__["Evaluator"], qf.verify

    def judged(graph, data, inputs):
        seen["chosen"] = [hash(x.numpy().tobytes()) for batch, _ in data for x in batch]
        return evaluator(graph, data, inputs)

    def verified(stages, data):
        seen["scored"] = [hash(x.numpy().tobytes()) for batch, _ in data for x in batch]
        return verify(stages, data)

    monkeypatch.setitem(qf.quantize.__globals__, "Evaluator", judged)
    monkeypatch.setattr(qf, "verify", verified)
    arguments = [
        "ptq",
        "--model",
        folder / "net.pt2",
        "--trust",
        "--data",
        "digits",
        "--image-size",
        16,
        "--images",
        61,
    ]
    told = figures(command(*arguments, "--max-drop", 50, "--no-recover", "--output", tmp_path / "net.pte", "--json"))
    assert told["verification"]["examples"] == len(seen["scored"]) == 31
    assert told["chosen_by"] == len(seen["chosen"]) == 30
    assert not set(seen["chosen"]) & set(seen["scored"])
    result = command(*arguments[:-1], 1, "--max-drop", 50, "--output", tmp_path / "net.pte")
    assert result.exit_code == 3
    assert "one image" in result.stderr


def test_ptq_writes_a_page_of_what_it_found(made):
    folder, told = made
    page, figures_ = (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())
    assert page.startswith("<!doctype html>")
    assert f"{told['verification']['stages'][2]['metric']:.2%}" in page
    assert {"quantization", "program", "verification"} <= set(figures_)
    assert figures_["verification"] == told["verification"]
    assert not list(folder.glob("*.partial"))


def test_sensitivity(made):
    folder, _ = made
    arguments = ["sensitivity", "--model", folder / "net.pt2", "--trust", "--data", "digits", "--image-size", 16]
    told = figures(command(*arguments, "--batches", 2, "--json"))
    assert {layer["layer"] for layer in told["layers"]} == {"0", "3", "4"}
    costs = [layer["to_integers"] for layer in told["layers"]]
    assert costs == sorted(costs)
    assert all(told["all_integers"] < cost for cost in costs)
    skipped = command(*arguments, "--batches", 1, "--skip", "4")
    assert skipped.exit_code == 0, skipped.output
    assert [line.split()[0] for line in skipped.stdout.splitlines()] == ["layer", "0", "3", "all"]


def test_verify_says_the_same_of_the_file(made, tmp_path):
    folder, told = made
    page = tmp_path / "page.html"
    arguments = ["verify", folder / "net.pte", "--data", "digits", "--runs", 0, "--report", page, "--json"]
    told_by_verify = figures(command(*arguments))
    assert "net.pte" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["verification"] == told_by_verify
    assert told_by_verify["stages"][0]["metric"] == told["verification"]["stages"][2]["metric"]
    assert told_by_verify["examples"] == told["verification"]["examples"] == 450


def test_verify_checks(made):
    folder, _ = made
    arguments = [
        "verify",
        folder / "net.pte",
        "--model",
        folder / "net.pt2",
        "--trust",
        "--data",
        "digits",
        "--runs",
        0,
    ]
    result = command(*arguments, "--images", 60, "--min-agreement", 0.9)  # net.pt2 was never trained
    assert result.exit_code == 1
    assert "failed: " in result.stderr
    assert "60 examples" in result.stdout


def test_compare(made):
    folder, _ = made
    other = folder / "float.pte"
    float_ = qf.export(torch.export.load(folder / "net.pt2").module(), (torch.zeros(1, 3, 16, 16),))
    float_.to_core_aten().to_edge(None).to_executorch().save(other)
    result = command("compare", folder / "net.pte", other, "--min-sqnr", 60, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["calls"]["XnnpackBackend"] == [1, 0]
    assert told["calls"]["aten::convolution.out"] == [0, 1]
    program = qf.load(folder / "net.pte")
    same = Differences.of(qf.verify({"first": program, "second": program}, [torch.randn(1, 3, 16, 16)], progress=False))
    assert same.calls == {}
    assert "the same calls" in str(same)


def test_qat(made):
    folder, told = made
    weights = qf.export(
        torch.export.load(folder / "net.pt2").module(), (torch.zeros(2, 3, 16, 16),), dynamic_batch=True
    )
    graph = weights.module()
    from safetensors.torch import load_file

    graph.load_state_dict(load_file(folder / "net.safetensors"))
    torch.export.save(
        qf.export(graph, (torch.zeros(2, 3, 16, 16),), dynamic_batch=True).program, folder / "trained.pt2"
    )
    arguments = ["--model", folder / "trained.pt2", "--trust", "--data", "digits", "--image-size", 16]
    result = command("qat", *arguments, "--epochs", 1, "--scheme", "w4a8", "--output", folder / "qat.pte", "--json")
    float_, ptq, fake, converted, pte = figures(result)["verification"]["stages"]
    assert float_["metric"] == told["verification"]["stages"][0]["metric"]  # the weights that ptq saved
    assert fake["kind"] == "fake-quantized"
    assert float(converted["outputs"][0]["step_sqnr_db"]) > 40  # "inf" where both are equal
    assert pte["metric"] > 0.9
    assert ptq["metric"] > 0.9


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("ending", ["pth", "pt", "safetensors", "bin"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, ending):
    checkpoint, canary = tmp_path / f"weights.{ending}", tmp_path / "canary"
    arguments = ["--data", "digits", "--output", tmp_path / "model.pte"]
    for write in (
        lambda: checkpoint.write_bytes(pickle.dumps(Canary(canary))),
        lambda: torch.save(Canary(canary), checkpoint),
    ):
        write()
        result = command("ptq", "--model", "resnet18", "--weights", checkpoint, *arguments)
        assert result.exit_code == 3
        assert "can't be read as weights" in result.stderr
        assert "Remedy" in result.stderr
        assert not canary.exists()
    whole = checkpoint.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        assert command("ptq", "--model", "resnet18", "--weights", checkpoint, *arguments).exit_code == 3
    torch.save({"a": torch.zeros(2), "b": "text"}, tmp_path / "other.pth")
    result = command("ptq", "--model", "resnet18", "--weights", tmp_path / "other.pth", *arguments)
    assert "holds no state dict" in result.stderr


def test_a_program_that_is_not_trusted_is_not_opened(tmp_path):
    program, canary = tmp_path / "model.pt2", tmp_path / "canary"
    program.write_bytes(pickle.dumps(Canary(canary)))
    arguments = ["ptq", "--model", program, "--data", "digits", "--output", tmp_path / "model.pte"]
    result = command(*arguments)
    assert result.exit_code == 3
    assert "--trust" in result.stderr
    assert not canary.exists()
    program.write_bytes(b"no archive")
    assert "can't be read as an exported program" in command(*arguments, "--trust").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ptq", "--model", "resnet18", "--output", "model.onnx"], 2, "does not end in .pte"),
        (["ptq", "--model", "resnet18", "--output", "missing/model.pte"], 2, "no folder that can be written to"),
        (["ptq", "--model", "resnet18", "--output", "model.pte"], 3, "nothing to train on"),
        (["ptq", "--model", "resnet99", "--data", "digits", "--output", "model.pte"], 3, "no such model"),
        (["ptq", "--model", "resnet18", "--data", "missing", "--output", "model.pte"], 3, "no such data"),
        (["qat", "--model", "resnet18", "--output", "model.pte"], 3, "nothing to train on"),
        (["verify", "missing.pte"], 3, "can't read"),
        (["verify", "missing.pte", "--model", "resnet18"], 3, "no weights to compare with"),
        (["compare", "missing.pte", "missing.pte"], 3, "can't read"),
        (["verify"], 2, "Missing argument"),
        (["verify", "missing.pte", "--report", "page.pdf"], 2, "does not end in .html"),
        (["sensitivity", "--model", "resnet18"], 3, "nothing to train on"),
        (["sensitivity", "--model", "missing.pt2", "--trust"], 3, "no such file"),
    ],
)
def test_what_can_not_be_done_says_why(tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    if code == 3:
        told = json.loads(command(*arguments, "--json").stdout)
        assert words in told["error"]["reason"]
    assert not list(tmp_path.iterdir())
