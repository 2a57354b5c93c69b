"""The command line: it answers at once, says what it did by its exit code, and speaks JSON."""

import json
import resource
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

import quantflow as qf
from quantflow.cli import main


def processor_seconds(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_at_once():
    code = "import sys; from quantflow.cli import main; main(['--help'], standalone_mode=False)"
    assert processor_seconds(f"{code}; assert 'torch' not in sys.modules") < 1.0


def test_import_costs_little_beside_torch():
    assert processor_seconds("import torch, quantflow") - processor_seconds("import torch") < 1.5


def test_every_public_name_is_there():
    code = (
        "import quantflow.capture.export, quantflow.preparation.prepare, quantflow as qf, types\n"
        "assert all(callable(getattr(qf, n)) for n in qf.__all__)\n"
        "assert not any(isinstance(getattr(qf, n), types.ModuleType) for n in qf.__all__)\n"
        "assert set(qf.__all__) <= set(dir(qf))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="expport"):
        _ = qf.expport


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)])
def test_every_command_has_help(command):
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_exit_codes(tmp_path):
    assert CliRunner().invoke(main, ["no-such-command"]).exit_code == 2
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "missing.pte")])
    assert result.exit_code == 3
    assert "can't read" in result.output


def test_doctor_finds_this_environment_well():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert "XnnpackBackend" in found["backends"]
    assert found["problems"] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_QUANTFLOW_COMPLETE" in result.output


def test_commands_and_options_are_completed():
    complete = BashComplete(main, {}, "quantflow", "_QUANTFLOW_COMPLETE")
    assert [found.value for found in complete.get_completions([], "sens")] == ["sensitivity"]
    assert "--report" in [found.value for found in complete.get_completions(["ptq"], "--re")]
