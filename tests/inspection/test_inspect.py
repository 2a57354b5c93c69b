"""Programs that can't be trusted: whatever the bytes, an error that says so, no crash and nothing of theirs run."""

import contextlib
import json
import pickle
import random
import struct

import pytest
import torch
from click.testing import CliRunner
from networks import ConvNet, randomize_statistics

import quantflow as qf
from quantflow import pte
from quantflow.cli import main
from quantflow.evaluation import examined
from quantflow.inspection import inspect as inspection
from quantflow.inspection.bounds import too_much
from quantflow.pte.tables import Reader

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def portable():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    return qf.export(randomize_statistics(ConvNet()).eval(), (x,)).to_core_aten().to_edge(None).to_executorch()


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_called_pte_is_not_opened(tmp_path, protocol):
    path, canary = tmp_path / "model.pte", tmp_path / "canary"
    path.write_bytes(pickle.dumps(_Canary(canary), protocol))
    for look in (qf.load, qf.inspect):
        with pytest.raises(qf.QuantflowError, match="not an ExecuTorch program"):
            look(path)
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 3
    assert not canary.exists()
    torch.save({"a": 1}, path)
    with pytest.raises(qf.QuantflowError, match="zip archive"):
        qf.inspect(path)


def test_what_crashes_the_runtime_is_told_here(portable, tmp_path):
    """The file is well formed; only the runtime finds out that a number is none, and aborts."""
    buffer = bytearray(portable.buffer)
    for plan in Reader(bytes(buffer)).root().tables(1):
        for value in plan.tables(2):
            if value.number(0, "B") == 2:  # an integer ...
                buffer[value._place(0)] = 1  # ... is nothing now
    path = tmp_path / "hostile.pte"
    path.write_bytes(buffer)
    assert qf.inspect(path, load=False).methods[0].kernels
    with pytest.raises(qf.QuantflowError, match=r"hostile\.pte: the runtime crashes on it: SIGABRT"):
        qf.inspect(path)


def hostile(program, change):
    """The bytes of ``program`` after ``change(buffer, plan)`` wrote into them, by the plan of ``forward``."""
    buffer = bytearray(program.buffer)
    plans = {plan.name(0): plan for plan in Reader(bytes(buffer)).root().tables(1)}
    change(buffer, plans["forward"])
    return bytes(buffer)


def test_what_asks_for_too_much_is_not_tried(portable):
    def plan_of_terabytes(buffer, plan):
        struct.pack_into("<q", buffer, plan._vector(8)[0] + 8, 5 * 2**40)

    def plan_below_zero(buffer, plan):
        struct.pack_into("<q", buffer, plan._vector(8)[0] + 8, -(2**40))

    def input_of_exabytes(buffer, plan):
        tensor = list(plan.tables(2))[plan.numbers(3, "i")[0]].table(1)
        struct.pack_into("<4i", buffer, tensor._vector(2)[0], *[2**15] * 4)

    found = qf.inspect(hostile(portable, plan_of_terabytes))
    words = "its memory plan asks for 5,497,558,138,880 bytes, this machine has"
    assert words in found.refused["forward"]
    assert set(found.refused) == set(found.contents.methods)
    for change, words in (
        (plan_below_zero, "negative"),
        (input_of_exabytes, "ask for 4,611,686,018,427,387,904 bytes"),
    ):
        assert words in too_much(pte.read(hostile(portable, change)).methods["forward"])


def test_what_never_ends_is_stopped(portable):
    """One of its instructions jumps to itself as long as a value is false, which it is."""

    def jump(buffer, plan):
        instructions = list(next(plan.tables(5)).tables(2))
        index, call = next((i, c.table(1)) for i, c in enumerate(instructions) if c.table(1)._place(0))
        read = {place for before in instructions[:index] for place in before.table(1).numbers(1, "i")}
        integers = [(i, v) for i, v in enumerate(plan.tables(2)) if v.number(0, "B") == 2 and i not in read]
        place, value = integers[-1]
        buffer[value._place(0)] = 3  # an integer is a boolean now ...
        if (held := value.table(1)._place(0)) is not None:
            buffer[held] = 0  # ... which is false
        buffer[instructions[index]._place(0)] = 3  # a call of a kernel is a jump now, by that value, to itself
        struct.pack_into("<i", buffer, call._place(0), place)
        struct.pack_into("<i", buffer, call._place(1), index)

    # The runtime itself gives up after ten million instructions, some tenths of a second.
    with pytest.raises(qf.QuantflowError, match=r"no end after 0\.05 s"):
        qf.inspect(hostile(portable, jump), seconds=0.05)


def input_that_is_none(buffer, plan):
    """The program is given an integer in place of its tensor."""
    index = next(i for i, value in enumerate(plan.tables(2)) if value.number(0, "B") == 2)
    struct.pack_into("<i", buffer, plan._vector(3)[0], index)


def test_what_was_only_loaded_is_told(portable):
    found = qf.inspect(hostile(portable, input_that_is_none))
    assert found.refused == {}
    assert found.not_run == {"forward": "input 0 is no tensor"}
    assert "loaded, not run: input 0 is no tensor" in str(found)
    assert json.loads(found.to_json())["not_run"] == found.not_run


def test_what_was_examined_is_what_is_given(portable, tmp_path, monkeypatch):
    """The file is another one as soon as it was read."""
    path, read, buffer = tmp_path / "model.pte", inspection.file_bytes, hostile(portable, input_that_is_none)

    def exchange(name):
        whole = read(name)
        path.write_bytes(portable.buffer)
        return whole

    path.write_bytes(buffer)
    monkeypatch.setattr(inspection, "file_bytes", exchange)
    with pytest.warns(qf.QuantflowWarning, match=r"model\.pte: forward was loaded, not run"):
        assert examined(path).buffer == buffer


def test_what_is_no_file_of_a_fit_size_is_not_read(tmp_path):
    with pytest.raises(qf.QuantflowError, match="a device"):
        qf.inspect("/dev/zero")
    huge = tmp_path / "huge.pte"
    with open(huge, "wb") as file:
        file.truncate(2**43)  # takes no place on the disk
    with pytest.raises(qf.QuantflowError, match=r"huge\.pte: can't read: 8,796,093,022,208 bytes"):
        qf.inspect(huge)


@pytest.mark.parametrize("seed", range(2))
def test_flipped_bytes_do_not_reach_this_process(portable, seed):
    """What the runtime makes of damaged constants and tables is told, and that is all."""
    numbers, buffer = random.Random(seed), bytearray(portable.buffer)
    while True:  # as far as the reader in plain Python lets them pass
        for _ in range(16):
            buffer[numbers.randrange(40, len(buffer))] ^= 1 << numbers.randrange(8)
        try:
            pte.read(bytes(buffer))
            break
        except qf.QuantflowError:
            buffer = bytearray(portable.buffer)
    with contextlib.suppress(qf.QuantflowError):
        assert qf.inspect(bytes(buffer)).refused is not None
