"""Methods, operators, delegates and memory of a ``.pte``, read by executorch's ``schema/program.fbs``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from quantflow.errors import QuantflowError
from quantflow.pte.header import Header, check_header
from quantflow.pte.tables import CorruptError, Reader, Table

T = TypeVar("T")

# The constant method that holds the signature of a quantflow program (JSON).
SIGNATURE_METHOD = "quantflow_signature"

# c10::ScalarType
_DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    15: "bfloat16",
}
_TENSOR, _STRING = 5, 6  # of the union KernelTypes
_KERNEL_CALL, _DELEGATE_CALL = 1, 2  # of the union InstructionArguments
_SEGMENT = 1  # of the enum DataLocation


@dataclass(frozen=True)
class TensorType:
    """One input or output.

    Attributes:
        dtype: The name of the torch dtype; None for an input or output that is no tensor.
        shape: The sizes, or their upper bounds if ``dynamic``.
        dynamic: Whether sizes may vary.
    """

    dtype: str | None
    shape: tuple[int, ...] = ()
    dynamic: bool = False

    def __str__(self) -> str:
        if self.dtype is None:
            return "no tensor"
        return f"{self.dtype}[{', '.join(('≤' if self.dynamic else '') + str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Method:
    """One method of a program.

    Attributes:
        name: The name of the method.
        inputs: The flat inputs.
        outputs: The flat outputs.
        kernels: Calls of executorch's own kernels, by operator.
        delegates: Calls of delegates, by backend.
        planned_bytes: Size of each buffer of the memory plan.
        text: The constant string that the method returns, or None if it returns something else.
    """

    name: str
    inputs: tuple[TensorType, ...] = ()
    outputs: tuple[TensorType, ...] = ()
    kernels: Counter[str] = field(default_factory=Counter)
    delegates: Counter[str] = field(default_factory=Counter)
    planned_bytes: tuple[int, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Contents:
    """The contents of a ``.pte``.

    Attributes:
        size: Bytes of the file.
        program_size: Bytes of the program itself. The rest of the file is constants and the compiled data of delegates.
        methods: The methods, by name.
    """

    size: int
    program_size: int
    methods: dict[str, Method]


def read(buffer: bytes) -> Contents:
    """Read the contents of ``buffer``, the bytes of a ``.pte``, without loading or running them.

    Raises:
        QuantflowError: at stage ``"runtime"``, for bytes that are not a complete and well-formed program.
    """
    header = check_header(buffer)
    try:
        root = Reader(buffer[: header.program_size]).root()
        _check_segments(root, header)
        methods = [_method(plan) for plan in root.tables(1)]
    except CorruptError as error:
        remedy = "the file is damaged, or was not made by executorch: lower it again"
        raise QuantflowError("runtime", f"the program does not load: {error}", remedy=remedy) from error
    if not methods:
        raise QuantflowError("runtime", "the program does not load: it has no methods", remedy="lower it again")
    named = {m.name: m for m in methods}
    if len(named) != len(methods):
        remedy = "the file was not made by executorch: lower it again"
        raise QuantflowError("runtime", "the program does not load: two methods have one name", remedy=remedy)
    return Contents(len(buffer), header.program_size, named)


def _check_segments(root: Table, header: Header) -> None:
    for segment in root.tables(4):
        if segment.number(0, "Q") + segment.number(1, "Q") > (header.segment_size or 2**62):
            raise CorruptError("a data segment is outside the file")
    data, segments = sum(1 for _ in root.tables(3)), sum(1 for _ in root.tables(4))
    for plan in root.tables(1):
        for delegate in plan.tables(7):
            processed = delegate.table(1)
            there = segments if processed is not None and processed.number(0, "b") == _SEGMENT else data
            if processed is None or processed.number(1, "I") >= there:
                raise CorruptError("a delegate has no data")


def _method(plan: Table) -> Method:
    values = list(plan.tables(2))
    operators = [(o.name(0), o.name(1)) for o in plan.tables(6)]
    names = [f"{name}.{overload}" if overload else name for name, overload in operators]
    backends = [d.name(0) for d in plan.tables(7)]
    kernels, delegates = Counter[str](), Counter[str]()
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            call = instruction.table(1)
            kind = instruction.number(0, "B")
            if kind in (_KERNEL_CALL, _DELEGATE_CALL) and call is not None:
                counted, called = (kernels, names) if kind == _KERNEL_CALL else (delegates, backends)
                counted[_at(called, call.number(0, "i"))] += 1
    outputs = [_at(values, i) for i in plan.numbers(4, "i")]
    return Method(
        plan.name(0),
        tuple(_tensor_type(_at(values, i)) for i in plan.numbers(3, "i")),
        tuple(_tensor_type(v) for v in outputs),
        kernels,
        delegates,
        tuple(plan.numbers(8, "q")[1:]),  # the first number is reserved
        _constant_text(outputs),
    )


def _at(items: list[T], index: int) -> T:
    if not 0 <= index < len(items):
        raise CorruptError("an index is out of range")
    return items[index]


def _tensor_type(value: Table) -> TensorType:
    tensor = value.table(1)
    if value.number(0, "B") != _TENSOR or tensor is None:
        return TensorType(None)
    dtype = _DTYPES.get(tensor.number(0, "b"), "unknown dtype")
    return TensorType(dtype, tuple(tensor.numbers(2, "i")), tensor.number(8, "b") != 0)


def _constant_text(outputs: list[Table]) -> str | None:
    if len(outputs) != 1 or outputs[0].number(0, "B") != _STRING:
        return None
    holder = outputs[0].table(1)
    return None if holder is None else holder.text(0)
