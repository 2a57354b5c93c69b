"""Recovery: winning back what post-training quantization loses.

Passes over a graph, each a copy in, a copy out, for any torchao quantizer: over the float graph before it is prepared
(:func:`equalize`, :func:`smooth`), over the prepared and calibrated graph the others. :func:`recover` tries those that need
no choice of a person's and keeps what helps.
"""

from quantflow.recovery.adaround import adaround
from quantflow.recovery.bias_correction import correct_bias
from quantflow.recovery.compensation import compensate
from quantflow.recovery.equalization import equalize
from quantflow.recovery.ranges import settle_ranges
from quantflow.recovery.recover import Recovered, Step, recover
from quantflow.recovery.sample import Sample
from quantflow.recovery.sensitivity import Sensitivity, sensitivity
from quantflow.recovery.smooth import smooth

__all__ = [
    "Recovered",
    "Sample",
    "Sensitivity",
    "Step",
    "adaround",
    "compensate",
    "correct_bias",
    "equalize",
    "recover",
    "sensitivity",
    "settle_ranges",
    "smooth",
]
