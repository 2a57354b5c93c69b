"""Private names stay within their package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def package_of(module):
    """``quantflow.graph`` of ``quantflow.graph.modes``; all of ``quantizers`` is one package."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "quantflow" else 1])


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_names(source, module, *, is_package=False):
    """The private names of other packages that ``source`` imports, or reads as attributes of modules that it imports."""
    tree = ast.parse(source)
    modules, found = {}, []  # what a name stands for, where that is a module

    def note(dotted):
        *path, name = dotted.split(".")
        if is_private(name) and package_of(".".join(path)) != package_of(module):
            found.append(dotted)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                base = module.split(".")
                base = base[: len(base) - node.level + is_package]
                home = ".".join([*base, *([home] if home else [])])
            if home.split(".")[0] not in ("quantflow", "quantizers"):
                continue
            for alias in node.names:
                note(f"{home}.{alias.name}")
                if is_module(f"{home}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{home}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in ("quantflow", "quantizers"):
                    note(alias.name)
                    modules[alias.asname or top] = alias.name if alias.asname else top

    def dotted(node):
        """The dotted name that ``node`` reads, if it begins with a module."""
        if isinstance(node, ast.Name):
            return modules.get(node.id)
        if isinstance(node, ast.Attribute) and (before := dotted(node.value)) is not None and is_module(before):
            return f"{before}.{node.attr}"
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)) is not None:
            note(name)
    return found


def test_no_package_reads_a_private_name_of_another():
    found = {}
    for path in sorted([*ROOT.glob("quantflow/**/*.py"), *ROOT.glob("quantizers/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if names := private_names(path.read_text(), module, is_package=is_package):
            found[module] = names
    assert not found


def test_private_names_of_others_are_found():
    source = """
import quantflow.graph.modes
from quantflow.graph import aten, modes as switched
from quantflow.graph.state import _a, b
from quantflow.ptq.recover import _c
from .moments import _d
from ..writing import _e

aten._f, aten.g, aten.__file__, switched._h(), quantflow.graph.modes._i, b._j
"""
    assert sorted(private_names(source, "quantflow.ptq.weight_reconstruction.gptq")) == [
        "quantflow.graph.aten._f",
        "quantflow.graph.modes._h",
        "quantflow.graph.modes._i",
        "quantflow.graph.state._a",
    ]
