"""Observers: what they watch of a tensor, and the quantization parameters that follow.

They follow torchao's observer protocol, so stock ``prepare_pt2e`` takes them too. :data:`OBSERVERS` names them for
configuration that is data.
"""

from quantflow.observers.base import Observer
from quantflow.observers.min_max import MinMaxObserver, PerChannelMinMaxObserver
from quantflow.observers.moving_average import MovingAverageMinMaxObserver, PerChannelMovingAverageMinMaxObserver
from quantflow.observers.mse import MSEObserver
from quantflow.observers.per_group import PerGroupMinMaxObserver

OBSERVERS: dict[str, tuple[type[Observer], type[Observer] | None]] = {
    # name: (per tensor, per channel, None where there is none)
    "min_max": (MinMaxObserver, PerChannelMinMaxObserver),
    "mse": (MSEObserver, None),
    "moving_average": (MovingAverageMinMaxObserver, PerChannelMovingAverageMinMaxObserver),
}

__all__ = [
    "OBSERVERS",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PerChannelMinMaxObserver",
    "PerChannelMovingAverageMinMaxObserver",
    "PerGroupMinMaxObserver",
]
