"""Quantization schemes: bits, symmetry, granularity and range estimation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from quantflow.errors import QuantflowError
from quantflow.observers import OBSERVERS, PerGroupMinMaxObserver


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor becomes integers, stored as int8.

    Attributes:
        bits: 2 to 8. Fewer than 8 bits use a part of int8; whether a backend packs them is the backend's matter.
        symmetric: The zero point is zero; of 8 bits, and in groups, the lowest integer is not used. Otherwise affine, with a
            zero point.
        per_channel: A scale for each output channel instead of one for the tensor.
        group: A scale for each so many inputs of each output channel, for the weight of a linear layer; 0 for none.
        dynamic: Take the range of each input at run time.
        observer: How ranges are estimated, a key of ``quantflow.observers.OBSERVERS``.

    Example:
        >>> from quantizers import TensorScheme
        >>> spec = TensorScheme(bits=4, symmetric=True, per_channel=True).spec()
        >>> spec.quant_min, spec.quant_max, spec.ch_axis
        (-8, 7, 0)
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False
    group: int = 0
    dynamic: bool = False
    observer: str = "min_max"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise QuantflowError("plan", f"{self.bits} bits do not fit int8", node="bits", remedy="2 to 8")
        if self.observer not in OBSERVERS:
            remedy = f"one of {sorted(OBSERVERS)}"
            raise QuantflowError("plan", f"no observer {self.observer!r}", node="observer", remedy=remedy)

        if self.group and not (self.group > 0 and self.symmetric and self.observer == "min_max"):
            reason, remedy = f"groups of {self.group} are symmetric, with min_max ranges", "symmetric=True, group=32"
            raise QuantflowError("plan", reason, node="group", remedy=remedy)

    def spec(self, axis: int = 0, effective_range: tuple[float, float] | None = None) -> QuantizationSpec:
        """Return the torchao spec of a tensor.

        Args:
            axis: The dimension that holds output channels.
            effective_range: The low and the high end beyond which values may saturate; None for no such ends.

        Returns:
            The spec.
        """
        top = 2 ** (self.bits - 1)
        observer: Any = OBSERVERS[self.observer][self.per_channel]
        if self.group:
            observer = PerGroupMinMaxObserver.with_args(group=self.group)
        if effective_range is not None:
            observer = observer.with_args(effective_range=effective_range)
        kind = (
            "per_channel" if self.per_channel or self.group else "per_tensor",
            "symmetric" if self.symmetric else "affine",
        )
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=observer,
            quant_min=1 - top if self.symmetric and (self.bits == 8 or self.group) else -top,
            quant_max=top - 1,
            qscheme=getattr(torch, "_".join(kind)),
            ch_axis=axis if self.per_channel or self.group else None,
            is_dynamic=self.dynamic,
        )


@dataclass(frozen=True)
class Scheme:
    """How activations and weights become integers: bits, symmetry, granularity and range estimation.

    Attributes:
        activation: The scheme of activations; by default int8, affine, per tensor, ranges of least squared error.
        weight: The scheme of weights; by default int8, symmetric, per channel, min-max ranges.

    Example:
        >>> from quantizers import W4A8, Scheme, TensorScheme
        >>> scheme = Scheme(weight=TensorScheme(bits=4, symmetric=True, per_channel=True))
        >>> str(scheme), scheme == W4A8, Scheme.from_json(scheme.to_json()) == scheme
        ('w4a8', True, True)
    """

    activation: TensorScheme = TensorScheme(observer="mse")
    weight: TensorScheme = TensorScheme(symmetric=True, per_channel=True)

    def to_json(self) -> str:
        """Return a JSON text from which :meth:`from_json` builds an equal scheme."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scheme:
        """Build the scheme that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The scheme.

        Raises:
            QuantflowError: at stage ``"plan"``, for an unknown key or values that are no scheme.
        """
        data = json.loads(text)
        _check_keys(data, cls)
        for part in data.values():
            _check_keys(part, TensorScheme)
        return cls(**{name: TensorScheme(**part) for name, part in data.items()})

    def __str__(self) -> str:
        kind = "dynamic " if self.activation.dynamic else ""
        same = self.activation.bits == self.weight.bits == 8
        groups = f" in groups of {self.weight.group}" if self.weight.group else ""
        return f"{kind}int8" if same else f"{kind}w{self.weight.bits}a{self.activation.bits}{groups}"


def _check_keys(data: dict, cls: type) -> None:
    unknown = set(data) - {f.name for f in fields(cls)}
    if unknown:
        known = sorted(f.name for f in fields(cls))
        raise QuantflowError("plan", f"unknown key {sorted(unknown)[0]!r}", node=cls.__name__, remedy=f"one of {known}")


INT8 = Scheme()
"""Activations and weights in int8 (W8A8), with ranges fixed by calibration."""

DYNAMIC_INT8 = Scheme(activation=TensorScheme(dynamic=True))
"""Activations and weights in int8, with activation ranges taken at run time."""

W4A8 = Scheme(weight=TensorScheme(bits=4, symmetric=True, per_channel=True))
"""Weights in 4 bits per channel, stored as int8; activations in int8."""

DYNAMIC_W4 = Scheme(activation=TensorScheme(dynamic=True), weight=TensorScheme(bits=4, symmetric=True, group=32))
"""Weights in 4 bits in groups of 32 inputs; activations in int8, with ranges taken at run time."""

SCHEMES = {"w8a8": INT8, "w4a8": W4A8, "dynamic-w8a8": DYNAMIC_INT8, "dynamic-w4a8": DYNAMIC_W4}
"""Schemes by name, as commands take them."""


def named_scheme(name: str) -> Scheme:
    """The scheme of :data:`SCHEMES` with this name.

    Raises:
        QuantflowError: at stage ``"plan"``, for an unknown name.
    """
    if name not in SCHEMES:
        raise QuantflowError("plan", f"no scheme is named {name!r}", node="scheme", remedy=f"one of {list(SCHEMES)}")
    return SCHEMES[name]
