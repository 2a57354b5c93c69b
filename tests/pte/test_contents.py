"""Reading a program in plain Python: whatever the bytes, the contents or an error that says so."""

import contextlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvNet, Structured, randomize_statistics

import quantflow as qf
from quantflow import pte


@pytest.fixture(scope="module")
def portable():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    return qf.export(randomize_statistics(ConvNet()).eval(), (x,)).to_core_aten().to_edge(None).to_executorch()


def test_what_is_read_is_what_the_runtime_says(portable):
    model, x, y = Structured().eval(), torch.randn(2, 8), torch.randn(2, 4)
    batch = torch.export.Dim("batch", max=6)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    delegated = qf.export(model, (x,), {"y": y}, dynamic_shapes=shapes).to_core_aten().to_edge("xnnpack")
    for program in (portable, delegated.to_executorch()):
        contents = pte.read(program.buffer)
        forward, meta = contents.methods["forward"], program._program.metadata("forward")
        assert set(contents.methods) == set(program._program.method_names)
        assert len(forward.inputs) == meta.num_inputs()
        for i, given_ in enumerate(forward.inputs):
            assert given_.shape == tuple(meta.input_tensor_meta(i).sizes())
        assert [t.shape for t in forward.outputs] == [
            tuple(meta.output_tensor_meta(i).sizes()) for i in range(meta.num_outputs())
        ]
        computed = (
            program.delegation.portable.total() - program.delegation.portable["aten::view_copy"]
        )  # a view in place
        assert forward.kernels.total() == computed
        assert forward.delegates.total() == program.delegation.calls
        assert qf.Program.from_buffer(program.buffer).signature == program.signature
    assert [t.dynamic for t in forward.inputs] == [True, True]


def test_no_truncation_is_taken_for_a_program(portable, tmp_path):
    whole = portable.buffer
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        with pytest.raises(qf.QuantflowError) as caught:
            qf.inspect(whole[:size])
        assert caught.value.stage == "runtime"
    path = tmp_path / "cut.pte"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(qf.QuantflowError, match=r"cut\.pte"):
        qf.load(path)


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_refused(content, headed):
    buffer = b"\x08\x00\x00\x00ET12" + content if headed else content
    with pytest.raises(qf.QuantflowError):
        pte.read(buffer)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_programs_are_read_or_refused(portable, seed):
    numbers, buffer = random.Random(seed), bytearray(portable.buffer)
    for _ in range(numbers.choice([1, 4, 64])):
        buffer[numbers.randrange(len(buffer))] = numbers.randrange(256)
    with contextlib.suppress(qf.QuantflowError):
        pte.read(bytes(buffer))


@pytest.mark.parametrize(("name", "count", "words"), [("x" * 10_000, 5_000, "more tables"), ("x\x1b[2K", 1, "control")])
def test_names_are_short_and_plain(name, count, words):
    """Operators that all have one name, which is long, or writes on the terminal of who looks at it."""
    import flatbuffers

    builder = flatbuffers.Builder(0)
    text = builder.CreateString(name)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, text, 0)
    operator = builder.EndObject()
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(operator)
    operators = builder.EndVector()
    builder.StartObject(9)
    builder.PrependUOffsetTRelativeSlot(6, operators, 0)
    plan = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(plan)
    plans = builder.EndVector()
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(1, plans, 0)
    builder.Finish(builder.EndObject(), b"ET12")
    with pytest.raises(qf.QuantflowError, match=words):
        qf.inspect(bytes(builder.Output()), load=False)


def test_a_small_file_can_not_describe_a_huge_program():
    """Vectors that all point at one table, level upon level: reading ends, by an error."""
    import flatbuffers

    builder = flatbuffers.Builder(0)
    builder.StartObject(1)
    instruction = builder.EndObject()
    parts = [instruction] * 30_000
    for field, fields in ((2, 3), (5, 9)):  # a chain of instructions, a plan of chains
        builder.StartVector(4, len(parts), 4)
        for part in parts:
            builder.PrependUOffsetTRelative(part)
        vector = builder.EndVector()
        builder.StartObject(fields)
        builder.PrependUOffsetTRelativeSlot(field, vector, 0)
        parts = [builder.EndObject()] * (30_000 if field == 2 else 1)
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(parts[0])
    plans = builder.EndVector()
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(1, plans, 0)
    builder.Finish(builder.EndObject(), b"ET12")
    with pytest.raises(qf.QuantflowError, match="more tables than a program has"):
        pte.read(bytes(builder.Output()))
