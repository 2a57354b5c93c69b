"""What this environment has of what quantflow needs."""

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

# What lowering to XNNPACK and the operators that stay outside need of the runtime.
_BACKENDS = ("XnnpackBackend",)
_KERNELS = ("aten::convolution.out", "quantized_decomposed::quantize_per_tensor.out")


@dataclass(frozen=True)
class Package:
    """A distribution that quantflow uses.

    Attributes:
        name: As on the package index.
        needed: The versions that quantflow works with.
        found: The version there is, None for none.
        extra: The extra of quantflow that asks for it; ``""`` where quantflow itself does.
        fits: Whether the version is one of those needed.
    """

    name: str
    needed: str
    found: str | None
    extra: str
    fits: bool


@dataclass(frozen=True)
class Environment:
    """What :func:`examine` found.

    Attributes:
        python: Its version, and the machine.
        packages: Those that quantflow asks for.
        backends: That the runtime can delegate to.
        kernels: How many operators the runtime has.
        threads: How many threads the runtime computes with.
        problems: What does not work, each with what to do about it.
    """

    python: str
    packages: tuple[Package, ...]
    backends: tuple[str, ...]
    kernels: int
    threads: int
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """All of it, as a JSON object."""
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
    """Look at the installed versions and, in a process of its own, at the ExecuTorch runtime."""
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
    """What quantflow's own metadata asks for, each name once; development tools left out."""
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
