"""Observers: they measure the range of a tensor and compute its scale and zero point.

They follow torchao's observer protocol, so stock ``prepare_pt2e`` accepts them too. :data:`OBSERVERS` maps the names that
configurations use to the classes.
"""

from quantflow.observers.base import Observer
from quantflow.observers.entropy import EntropyObserver, PerChannelEntropyObserver
from quantflow.observers.fixed import FixedQParamsObserver
from quantflow.observers.min_max import MinMaxObserver, PerChannelMinMaxObserver
from quantflow.observers.moving_average import MovingAverageMinMaxObserver, PerChannelMovingAverageMinMaxObserver
from quantflow.observers.mse import MSEObserver, PerChannelMSEObserver
from quantflow.observers.per_group import PerGroupMinMaxObserver
from quantflow.observers.percentile import PercentileObserver, PerChannelPercentileObserver

OBSERVERS: dict[str, tuple[type[Observer], type[Observer]]] = {
    # name: (per tensor, per channel)
    "entropy": (EntropyObserver, PerChannelEntropyObserver),
    "min_max": (MinMaxObserver, PerChannelMinMaxObserver),
    "mse": (MSEObserver, PerChannelMSEObserver),
    "percentile": (PercentileObserver, PerChannelPercentileObserver),
    "moving_average": (MovingAverageMinMaxObserver, PerChannelMovingAverageMinMaxObserver),
}
"""The observers by the name that ``TensorScheme(observer=...)`` takes, each per tensor and per channel."""

__all__ = [
    "OBSERVERS",
    "EntropyObserver",
    "FixedQParamsObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PerChannelEntropyObserver",
    "PerChannelMSEObserver",
    "PerChannelMinMaxObserver",
    "PerChannelMovingAverageMinMaxObserver",
    "PerChannelPercentileObserver",
    "PerGroupMinMaxObserver",
    "PercentileObserver",
]
