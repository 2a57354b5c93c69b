"""The inputs and outputs of a program: names, shapes, dtypes and structure, and checks of inputs against them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule

from quantflow.errors import QuantflowError
from quantflow.graph.state import is_written
from quantflow.signature.pytree_safety import spec_is_plain
from quantflow.upstream import pytree
from quantflow.upstream.graph_modules import pytree_info_of


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that varies between calls within bounds (None: unbounded). Dimensions of one name have one size per call."""

    name: str
    min: int
    max: int | None

    def __str__(self) -> str:
        return f"{self.name}:{self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class Input:
    """One input: a tensor of ``shape`` and ``dtype`` or, if ``dtype`` is None, the constant ``constant``."""

    name: str
    dtype: str | None = None
    shape: tuple[int | DynamicDim, ...] = ()
    constant: Any = None

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{self.name} = {self.constant!r}"
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """The flat inputs of a program, and the structures of its inputs ``(args, kwargs)`` and outputs.

    The structures are ``torch.utils._pytree`` specs, or None if only the flat form is known. ``written`` holds the positions of
    the inputs that the program writes. The program returns their new values before its outputs.
    """

    inputs: tuple[Input, ...]
    in_spec: pytree.TreeSpec | None = None
    out_spec: pytree.TreeSpec | None = None
    written: tuple[int, ...] = ()

    @classmethod
    def of_program(cls, program: ExportedProgram) -> Signature:
        """Return the signature of an exported program, with the bounds of its dynamic dimensions."""
        nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        inputs: list[Input] = []
        written: list[int] = []
        changed = set(program.graph_signature.user_inputs_to_mutate.values())
        names: dict[str, str] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind != InputKind.USER_INPUT:
                continue
            if hasattr(spec.arg, "value"):
                inputs.append(Input(spec.arg.name, constant=spec.arg.value))
            else:
                if spec.arg.name in changed or is_written(nodes[spec.arg.name]):  # without or with in-place operators
                    written.append(len(inputs))
                inputs.append(_input(nodes[spec.arg.name], program.range_constraints, names))
        return cls(tuple(inputs), program.call_spec.in_spec, program.call_spec.out_spec, tuple(written))

    @classmethod
    def of_graph(cls, module: GraphModule) -> Signature:
        """Return the signature recorded when a graph was captured, or one read from its placeholders."""
        if "quantflow_signature" in module.meta:
            return module.meta["quantflow_signature"]
        names: dict[str, str] = {}
        inputs = [_input(n, {}, names) for n in module.graph.nodes if n.op == "placeholder"]
        info = pytree_info_of(module.graph)
        return cls(tuple(inputs), info.in_spec if info else None, info.out_spec if info else None)

    def flatten(self, args: Sequence[object], kwargs: Mapping[str, object], *, stage: str) -> list[Any]:
        """Return the flat inputs of the call ``(*args, **kwargs)``.

        Raises:
            QuantflowError: at ``stage``, when the structure, count, dtype or shape differs from the signature.
        """
        flat = self.leaves(args, kwargs, stage=stage)
        sizes: dict[str, int] = {}
        for declared, given in zip(self.inputs, flat, strict=True):
            _check(declared, given, sizes, stage)
        return flat

    def leaves(self, args: Sequence[object], kwargs: Mapping[str, object], *, stage: str) -> list[Any]:
        """Return the flat inputs as :meth:`flatten` does, but check only their structure and count."""
        if self.in_spec is None:
            names = [i.name for i in self.inputs][len(args) :]
            if sorted(names) != sorted(kwargs) and kwargs:
                remedy = f"pass {self.describe_inputs()} by position"
                raise QuantflowError(
                    stage, f"no inputs called {sorted(kwargs)}", node=str(sorted(kwargs)[0]), remedy=remedy
                )
            flat = [*args, *(kwargs[name] for name in names if name in kwargs)]
        else:
            names = self.in_spec.children()[1].context or []
            if sorted(names) == sorted(kwargs):
                kwargs = {name: kwargs[name] for name in names}
            flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
            if spec != self.in_spec and len(flat) == len(self.inputs):
                raise QuantflowError(
                    stage,
                    f"the inputs have the structure {spec}, the program takes {self.in_spec}",
                    remedy="pass positional and keyword inputs, tuples and dicts as at export",
                )
        if len(flat) != len(self.inputs):
            raise QuantflowError(
                stage,
                f"{len(flat)} inputs given, {len(self.inputs)} taken: {self.describe_inputs()}",
                remedy="pass every input, in the structure used at export",
            )
        return flat

    def call(self, flat: Sequence[object]) -> tuple[tuple, dict[str, Any]]:
        """Return positional and keyword inputs from flat inputs; all are positional if the structure is unknown."""
        if self.in_spec is None:
            return tuple(flat), {}
        args, kwargs = pytree.tree_unflatten(list(flat), self.in_spec)
        return tuple(args), kwargs

    def write_back(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Sequence[Any]:
        """Copy the values that the program wrote into the flat ``inputs`` of a call, and return the other ``outputs``."""
        with torch.no_grad():
            for position, new in zip(self.written, outputs, strict=False):
                inputs[position].copy_(new)
        return outputs[len(self.written) :]

    def unflatten(self, outputs: Sequence[object]) -> Any:
        """Return ``outputs`` in the model's own structure. If it is unknown, return the single output or a tuple."""
        if self.out_spec is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        if len(outputs) != self.out_spec.num_leaves:
            reason = f"{len(outputs)} outputs, but the model returns {self.out_spec.num_leaves}"
            raise QuantflowError("runtime", reason, remedy="lower it again: the program is of another model")
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def describe_inputs(self) -> str:
        """Return a description of the inputs on one line."""
        return "; ".join(map(str, self.inputs)) or "none"

    def unbounded(self) -> list[tuple[Input, DynamicDim]]:
        """Return the dynamic dimensions without an upper bound."""
        return [(i, d) for i in self.inputs for d in i.shape if isinstance(d, DynamicDim) and d.max is None]

    def to_json(self) -> str:
        """Return JSON from which :meth:`from_json` builds an equal signature."""
        inputs = [
            {
                "name": i.name,
                "dtype": i.dtype,
                "shape": [d if isinstance(d, int) else [d.name, d.min, d.max] for d in i.shape],
                "constant": i.constant if isinstance(i.constant, (int, float, bool, str, type(None))) else None,
            }
            for i in self.inputs
        ]
        return json.dumps(
            {
                "inputs": inputs,
                "in_spec": _dump_spec(self.in_spec),
                "out_spec": _dump_spec(self.out_spec),
                "written": self.written,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Return the signature that :meth:`to_json` wrote."""
        data = json.loads(text)
        inputs = tuple(
            Input(
                i["name"],
                i["dtype"],
                tuple(d if isinstance(d, int) else DynamicDim(*d) for d in i["shape"]),
                i["constant"],
            )
            for i in data["inputs"]
        )
        written = tuple(int(position) for position in data.get("written", ()))
        return cls(inputs, _load_spec(data["in_spec"]), _load_spec(data["out_spec"]), written)


def _dump_spec(spec: pytree.TreeSpec | None) -> str | None:
    try:
        return None if spec is None else pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError):  # a container type that can't be serialized
        return None


def _load_spec(text: str | None) -> pytree.TreeSpec | None:
    if text is None or not spec_is_plain(text):
        return None
    try:
        return pytree.treespec_loads(text)
    except Exception:  # a container type that is not registered in this process, or invalid text in the file
        return None


def _input(node: torch.fx.Node, ranges: Mapping[Any, Any], names: dict[str, str]) -> Input:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return Input(node.name, constant=val)
    shape = tuple(_dim(size, position, ranges, names) for position, size in enumerate(val.shape))
    return Input(node.name, _dtype_name(val.dtype), shape)


def _dim(size: int | torch.SymInt, position: int, ranges: Mapping[Any, Any], names: dict[str, str]) -> int | DynamicDim:
    if isinstance(size, int):
        return size
    # The tracer numbers its symbols. The name "batch" is clearer in messages.
    wanted = "batch" if position == 0 and "batch" not in names.values() else f"dim{len(names)}"
    name = names.setdefault(str(size), wanted)
    bounds = ranges.get(size.node.expr)
    if bounds is None:
        return DynamicDim(name, 1, None)
    unbounded = str(bounds.upper) in ("int_oo", "oo") or bounds.upper >= 2**31
    return DynamicDim(name, int(bounds.lower), None if unbounded else int(bounds.upper))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(declared: Input, given: object, sizes: dict[str, int], stage: str) -> None:
    if declared.dtype is None:
        if declared.constant is not None and not _equals(given, declared.constant):
            shown = f"{given!r}" if isinstance(given, (int, float, str)) else f"a {type(given).__name__}"
            reason = f"{shown} given where the program was captured with the constant {declared.constant!r}"
            remedy = f"pass {declared.constant!r} there, or export again with the other value"
            raise QuantflowError(stage, reason, node=declared.name, remedy=remedy)
        return
    remedy = f"pass {declared}"
    if not isinstance(given, torch.Tensor):
        raise QuantflowError(stage, f"{type(given).__name__} given, a tensor taken", node=declared.name, remedy=remedy)
    if _dtype_name(given.dtype) != declared.dtype:
        reason = f"dtype {_dtype_name(given.dtype)} given, {declared.dtype} taken"
        raise QuantflowError(stage, reason, node=declared.name, remedy=remedy)
    if not _fits(tuple(given.shape), declared.shape, sizes):
        reason = f"shape {list(given.shape)} given, [{', '.join(map(str, declared.shape))}] taken"
        if given.shape[1:] == declared.shape[1:]:
            remedy += "; for batches of up to N, export the converted graph with dynamic_batch=N before you lower it"
        raise QuantflowError(stage, reason, node=declared.name, remedy=remedy)


def _equals(given: object, constant: object) -> bool:
    """Whether ``given`` equals ``constant``; False for a tensor and for a value that can't be compared."""
    try:
        return not isinstance(given, torch.Tensor) and bool(given == constant)
    except (TypeError, ValueError, RuntimeError):  # for example, an array
        return False


def _fits(shape: tuple[int, ...], declared: tuple[int | DynamicDim, ...], sizes: dict[str, int]) -> bool:
    if len(shape) != len(declared):
        return False
    for size, dim in zip(shape, declared, strict=True):
        if isinstance(dim, int):
            if size != dim:
                return False
        elif size != sizes.setdefault(dim.name, size) or size < dim.min or (dim.max is not None and size > dim.max):
            return False
    return True
