"""Check of the installed packages and the ExecuTorch runtime against the requirements of quantflow."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from quantflow.errors import QuantflowError
from quantflow.inspection.quarantine import in_quarantine

# The backends and kernels that programs lowered to XNNPACK need from the runtime.
_BACKENDS = ("XnnpackBackend",)
_KERNELS = ("aten::convolution.out", "quantized_decomposed::quantize_per_tensor.out")


@dataclass(frozen=True)
class Package:
    """A distribution that quantflow uses.

    Attributes:
        name: The name of the distribution.
        needed: The versions that quantflow supports.
        found: The installed version, or None.
        extra: The extra of quantflow that requires the package; ``""`` if quantflow itself requires it.
        fits: Whether the installed version is supported.
    """

    name: str
    needed: str
    found: str | None
    extra: str
    fits: bool


@dataclass(frozen=True)
class Environment:
    """The result of :func:`examine`.

    Attributes:
        python: The version of Python, and the machine.
        packages: The packages that quantflow requires.
        backends: The backends that the runtime can delegate to.
        kernels: The number of operators in the runtime.
        threads: The number of threads that the runtime uses.
        problems: The problems found, each with a remedy.
    """

    python: str
    packages: tuple[Package, ...]
    backends: tuple[str, ...]
    kernels: int
    threads: int
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """Return all fields as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        width = max(len(p.name) for p in self.packages)
        lines = [f"python {self.python}"]
        for package in self.packages:
            state = "ok" if package.fits else "other version" if package.found else "not installed"
            asked = f"  [{package.extra}]" if package.extra else ""
            found = package.found or "-"
            lines.append(f"  {package.name:<{width}}  {found:<12} {state:<14} needs {package.needed or 'any'}{asked}")
        if self.backends or self.kernels:
            backends = ", ".join(self.backends) or "none"
            lines.append(f"runtime: {self.kernels} kernels, {self.threads} threads, backends: {backends}")
        lines += [f"problem: {problem}" for problem in self.problems] or ["all well"]
        return "\n".join(lines)


def examine(*, runtime: bool = True) -> Environment:
    """Check the installed versions and, in a separate process, the ExecuTorch runtime."""
    packages = tuple(_packages())
    problems = [_remedy(p) for p in packages if not p.fits and not p.extra]
    found: dict[str, Any] = {"backends": [], "kernels": [], "threads": 0}
    if runtime:
        try:
            found = in_quarantine("environment")
            lacking = [name for name in _BACKENDS if name not in found["backends"]]
            lacking += [name for name in _KERNELS if name not in found["kernels"]]
            problems += [f"the runtime lacks {name}: pip install --force-reinstall executorch" for name in lacking]
        except QuantflowError as error:
            problems.append(f"the ExecuTorch runtime does not start: {error.reason}: reinstall executorch")
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    backends, kernels = tuple(found["backends"]), len(found["kernels"])
    return Environment(python, packages, backends, kernels, int(found["threads"]), tuple(problems))


def _packages() -> list[Package]:
    """The packages in quantflow's metadata, each once and without development tools."""
    found: dict[str, Package] = {}
    for text in metadata.requires("quantflow") or ():
        requirement = Requirement(text)
        extra = next(iter(re.findall(r"""extra == ["']([^"']+)["']""", str(requirement.marker or ""))), "")
        if extra == "dev" or requirement.name == "quantflow" or requirement.name in found:
            continue
        try:
            version: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        found[requirement.name] = Package(requirement.name, str(requirement.specifier), version, extra, fits)
    return list(found.values())


def _remedy(package: Package) -> str:
    wanted = f'pip install "{package.name}{package.needed}"'
    if package.found is None:
        return f"{package.name} is not installed: {wanted}"
    return f"{package.name} {package.found} is not known to work here: {wanted}"
