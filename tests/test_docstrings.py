"""Every public name has a docstring with all its sections, and an example that runs."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import re

import pytest

PACKAGES = (
    "quantflow",
    "quantflow.analysis",
    "quantflow.evaluation",
    "quantflow.mixed_precision",
    "quantflow.observers",
    "quantflow.ptq",
    "quantflow.training",
    "quantizers",
)
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")
# The docstring of a module's class says what its forward does; torch calls extra_repr.
UNDOCUMENTED = ("forward", "extra_repr")


def _public():
    """Public classes and functions by name, each once, and the names of public constants."""
    objects, constants = {}, []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found) or inspect.isroutine(found):
                objects.setdefault(found, f"{package}.{name}")
            else:
                constants.append((package, name))
    return {name: found for found, name in objects.items()}, constants


def _methods(cls):
    """The public methods and properties that ``cls`` itself defines, as functions."""
    attributes = getattr(cls, "__dataclass_fields__", {})
    for name, given in vars(cls).items():
        if name in attributes:
            continue  # its default may be a function
        given = getattr(given, "__func__", None) or getattr(given, "func", None) or given
        function = given.fget if isinstance(given, property) else given
        if inspect.isfunction(function) and not name.startswith("_") and name not in UNDOCUMENTED:
            yield name, function, isinstance(given, property)


OBJECTS, CONSTANTS = _public()
CLASSES = {name: found for name, found in OBJECTS.items() if inspect.isclass(found)}
FUNCTIONS = {name: found for name, found in OBJECTS.items() if not inspect.isclass(found)}
METHODS = {
    f"{name}.{method}": (cls, function, is_property)
    for name, cls in CLASSES.items()
    for method, function, is_property in _methods(cls)
}


def _sections(text):
    """The sections of a docstring by name, in order, each as its lines; ``""`` is what comes before the first."""
    found, name = {"": []}, ""
    for line in inspect.cleandoc(text or "").splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            name = line[:-1]
            assert name not in found, f"two sections {name}"
        found.setdefault(name, []).append(line)
    return found


def _entries(lines):
    """The names that a section explains, without those that it explains nothing of."""
    return [match[1] for line in lines if (match := re.match(r" {4}(\w+): \S", line))]


def _parameters(function):
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "cls")]


def _check_form(text):
    """A summary of one line, then a blank one; sections in order, none of them empty."""
    sections = _sections(text)
    lines = inspect.cleandoc(text or "").splitlines()
    assert lines, "no docstring"
    assert lines[0].endswith("."), f"the summary is no sentence of one line: {lines[0]}"
    assert len(lines) == 1 or not lines[1], f"no blank line behind the summary: {lines[1]}"
    order = [name for name in sections if name]
    assert order == [name for name in SECTIONS if name in order]
    for name in order:
        assert any(line.strip() for line in sections[name][1:]), f"{name} is empty"
    return sections


def _check_function(function, text):
    """Args for every parameter and for nothing else, Returns where something is returned, Raises where it raises itself."""
    sections = _check_form(text)
    assert _entries(sections.get("Args", [])) == _parameters(function)
    assert ("Returns" in sections) == (str(inspect.signature(function).return_annotation) not in ("None", "NoReturn"))
    _check_raises(function, sections)


def _check_raises(function, sections):
    if re.search(r"\braise QuantflowError\b", inspect.getsource(function)):
        assert any("QuantflowError: " in line for line in sections.get("Raises", []))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_returns_and_raises(name):
    _check_function(inspect.unwrap(FUNCTIONS[name]), FUNCTIONS[name].__doc__)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_takes_or_holds(name):
    cls = CLASSES[name]
    sections = _check_form(vars(cls).get("__doc__"))
    if dataclasses.is_dataclass(cls):
        assert _entries(sections.get("Attributes", [])) == [field.name for field in dataclasses.fields(cls)]
    elif "Args" in sections or "__init__" in vars(cls):
        assert _entries(sections.get("Args", [])) == _parameters(cls.__init__)
    else:  # its arguments are those of a base, which is named
        bases = [base.__name__ for base in cls.__mro__[1:] if base in CLASSES.values()]
        assert any(f":class:`{base}`" in cls.__doc__ for base in bases)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_takes_and_returns(name):
    cls, function, is_property = METHODS[name]
    sections = _check_form(function.__doc__)
    _check_raises(function, sections)
    overridden = [vars(base).get(function.__name__) for base in cls.__mro__[1:]]
    if is_property or not _parameters(function):
        return  # the summary says what it is or returns
    if "Args" not in sections and any("Args:" in (getattr(method, "__doc__", "") or "") for method in overridden):
        return  # an override takes and returns what the method of its base does
    _check_function(function, function.__doc__)


@pytest.mark.parametrize("name", OBJECTS)
def test_an_example_runs(name):
    # Not by pytest --doctest-modules, so that running tests/ alone runs the examples too.
    found = OBJECTS[name]
    example = _sections(vars(found)["__doc__"] if inspect.isclass(found) else found.__doc__).get("Example", [])
    lines = [line for line in example if line.lstrip().startswith((">>> ", "... "))]
    assert 3 <= len(lines) <= 10, f"an example of {len(lines)} lines"
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs={})
    said = []
    assert not doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, "".join(said)


@pytest.mark.parametrize(("package", "name"), CONSTANTS)
def test_a_constant_has_a_docstring(package, name):
    # A constant takes and returns nothing: the sentence behind its assignment says what it is.
    imports = ast.parse(inspect.getsource(importlib.import_module(package))).body
    homes = [i.module for i in imports if isinstance(i, ast.ImportFrom) and name in [a.name for a in i.names]]
    body = ast.parse(inspect.getsource(importlib.import_module(homes[0] if homes else package))).body
    assigned = [i for i, node in enumerate(body) if _assigns(node, name)]
    behind = body[assigned[0] + 1]
    assert isinstance(behind, ast.Expr)
    _check_form(behind.value.value)


def _assigns(node, name):
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
