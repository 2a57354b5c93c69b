"""The base class of observers: the integer type, the range, the computation of scale and zero point, the state dict."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.observer import ObserverBase

from quantflow.distributed import widest
from quantflow.qparams.qparams import PER_CHANNEL, SMALLEST_SCALE, SYMMETRIC, choose_qparams


class Observer(ObserverBase):
    """Watches the range of a tensor and derives scale and zero point; passes the tensor through unchanged.

    Args:
        dtype: Integer type of the quantized tensor.
        quant_min: Smallest integer used.
        quant_max: Largest integer used.
        qscheme: Per tensor or per channel, affine or symmetric.
        ch_axis: The channel dimension, for per-channel schemes.
        eps: Smallest scale.
        is_dynamic: Whether the range is taken anew from each input at run time.
        effective_range: The part of the range outside of which values may saturate, as a low and a high end; None for all.

    Attributes:
        min_val: Lower end of the range so far, float32, a scalar or one a channel; ``inf`` before any data.
        max_val: Upper end of the range so far; ``-inf`` before any data.

    Example:
        >>> import torch
        >>> from quantflow.observers import Observer
        >>> class LastBatchObserver(Observer):
        ...     def forward(self, x):
        ...         self.min_val, self.max_val = self.extremes(x)
        ...         return x
        >>> observer = LastBatchObserver()
        >>> _ = observer(torch.tensor([-1.0, 3.0]))
        >>> observer.min_val, observer.max_val
        (tensor(-1.), tensor(3.))
    """

    min_val: torch.Tensor
    max_val: torch.Tensor
    resized: tuple[str, ...] = ("min_val", "max_val")  # buffers whose shape follows the data

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        quant_min: int = -128,
        quant_max: int = 127,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        ch_axis: int = 0,
        eps: float = SMALLEST_SCALE,
        is_dynamic: bool = False,
        effective_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.qscheme, self.ch_axis, self.eps = qscheme, ch_axis, eps
        self.effective_range = effective_range
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))

    @property
    def per_channel(self) -> bool:
        """Whether each channel has a range of its own."""
        return self.qscheme in PER_CHANNEL

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is zero."""
        return self.qscheme in SYMMETRIC

    def spec(self) -> dict[str, Any]:
        """Return the arguments that make an observer of the same integers."""
        names = ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "eps", "is_dynamic", "effective_range")
        return {name: getattr(self, name) for name in names}

    def reset(self) -> None:
        """Clear the observed range."""
        self.min_val = torch.tensor(float("inf"), device=self.min_val.device)
        self.max_val = torch.tensor(float("-inf"), device=self.max_val.device)

    def start_from(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take a range that was found by other means, as if it had been seen.

        Args:
            low: The lower end, float32, a scalar or one a channel.
            high: The upper end, of the same shape.
        """
        self.min_val, self.max_val = low, high

    def observe_together(self, x: torch.Tensor) -> None:
        """Observe the tensors of all processes, so that the range is the same in each.

        Args:
            x: The tensor of this process.
        """
        self(x)
        self.synchronize()

    def hold_in_common(self) -> None:
        """Mark the current statistics as common to all processes: :meth:`synchronize` counts them once."""

    def synchronize(self) -> None:
        """Take what all processes saw, the same in each; what they held in common before counts once."""
        if self.min_val.ndim == 0 or self.min_val.numel():
            self.min_val, self.max_val = widest(self.min_val, self.max_val)

    def extremes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the greatest value of a tensor, inside the effective range.

        Args:
            x: The tensor, of any shape.

        Returns:
            Both as float32: scalars, or one a channel for per-channel schemes.
        """
        x = x.detach()
        if self.per_channel:
            other = [d for d in range(x.ndim) if d != self.ch_axis]
            low, high = (
                (x.amin(other), x.amax(other)) if other else (x, x)
            )  # two passes instead of aminmax's one, but a fifth of its time on CPU
        else:
            low, high = x.aminmax()
        if self.effective_range is not None:
            low, high = low.clamp(*self.effective_range), high.clamp(*self.effective_range)
        return low.float(), high.float()

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale (float32) and the zero point (int32), scalars or one a channel."""
        return choose_qparams(
            self.min_val,
            self.max_val,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.symmetric,
            eps=self.eps,
        )

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        # The number of channels is unknown before the first data, so the buffers take the shapes of the state dict.
        for name in self.resized:
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} [{self.quant_min}, {self.quant_max}], {self.qscheme}"
