"""No module outside ``quantflow.upstream`` uses a private name of torch, torchao or executorch."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import quantflow
import quantizers

ROOTS = [Path(quantflow.__file__).parent, Path(quantizers.__file__).parent]
UPSTREAM = ROOTS[0] / "upstream"
FILES = [file for root in ROOTS for file in sorted(root.rglob("*.py")) if UPSTREAM not in file.parents]
PACKAGES = ("torch", "torchao", "executorch")

# Hooks that only a method of a subclass can extend; the base class calls them.
HOOKS = {
    "_load_from_state_dict": "nn.Module calls it for the state of one module; observers without data accept other shapes",
    "_deepcopy_init": "fx.GraphModule calls it for the constructor of a deep copy",
}
OTHERS = {"_exit": "of the module os"}


def private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def is_upstream(module):
    return module.split(".")[0] in PACKAGES


def is_private_path(path):
    return is_upstream(path) and any(map(private, path.split(".")))


def parsed(source):
    return list(ast.walk(ast.parse(source)))


def names_defined(nodes):
    """Functions, classes, variables and attributes of ``self`` that quantflow or quantizers define."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def is_operator(node):
    """Whether ``node`` is an operator such as ``aten._softmax``: it belongs to the opset, which is public."""
    return (isinstance(node, ast.Name) and node.id in ("aten", "_aten", "_edge")) or (
        isinstance(node, ast.Attribute) and node.attr == "aten"
    )


def _instances():
    module = fx.symbolic_trace(nn.Linear(1, 1))
    return nn.BatchNorm1d(1), module, module.graph, fx.Interpreter(module), torch.zeros(1), torch.ops.aten.add.Tensor


# Private names that classes of torch have.
TAKEN = {name for instance in _instances() for name in dir(instance) if private(name)}


def uses(source, own):
    """The private names of dependencies in ``source``, with their lines."""
    for node in parsed(source):
        if isinstance(node, ast.ImportFrom) and node.module and is_upstream(node.module):
            yield from (
                (f"{node.module}.{a.name}", node) for a in node.names if is_private_path(f"{node.module}.{a.name}")
            )
        elif isinstance(node, ast.Import):
            yield from ((a.name, node) for a in node.names if is_private_path(a.name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"\w+(\.\w+)+", node.value) and is_private_path(node.value):
                yield node.value, node
        elif isinstance(node, ast.ClassDef) and node.bases:
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
            yield from ((f"def {m.name}", m) for m in methods if m.name in TAKEN and m.name not in HOOKS)
        elif isinstance(node, ast.keyword) and node.arg and private(node.arg):
            yield f"{node.arg}=", node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ATTRIBUTE_ACCESS:
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and private(name) and (name in TAKEN or name not in own):
                yield name, node
        elif isinstance(node, ast.Attribute) and private(node.attr) and not is_operator(node.value):
            hook = is_super(node.value) and node.attr in HOOKS
            taken = node.attr in TAKEN and not is_self(node.value)
            if not hook and node.attr not in OTHERS and (taken or node.attr not in own):
                yield node.attr, node


ATTRIBUTE_ACCESS = ("getattr", "setattr", "hasattr", "delattr")
OWN = {name for file in FILES for name in names_defined(parsed(file.read_text()))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOTS[0].parent)))
def test_no_private_name(file):
    assert [f"{name} in line {node.lineno}" for name, node in uses(file.read_text(), OWN)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._ops",
        "import torch.utils._pytree as pytree",
        "from torch.fx.graph import _PyTreeCodeGen",
        "from executorch.exir.dialects._ops import ops",
        "importlib.import_module('torch._higher_order_ops.executorch_call_delegate')",
        "torch._C._set_grad_enabled(True)",
        "node.target._schema",
        "getattr(node.target, '_opname', '')",
        "module._parameters",
        "QuantizationAnnotation(_annotated=True)",
        "class Observer(nn.Module):\n    def _save_to_state_dict(self): ...",
    ],
)
def test_a_private_name_is_found(source):
    assert list(uses(source, OWN))


def test_the_hooks_are_hooks_of_torch():
    assert set(HOOKS) <= TAKEN
