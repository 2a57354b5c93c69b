"""Recovery: winning back what post-training quantization loses.

Passes over a graph, each a copy in, a copy out, for any torchao quantizer: over the float graph before it is prepared
(:func:`equalize`, :func:`smooth`), over the prepared and calibrated graph the others. :func:`recover` tries those that need
no choice of a person's and keeps what helps.
"""

from quantflow.data.sample import Sample
from quantflow.ptq.adaround.adaround import adaround
from quantflow.ptq.bias_correction.bias_correction import correct_bias
from quantflow.ptq.equalization.equalization import equalize
from quantflow.ptq.range_optimization import settle_ranges
from quantflow.ptq.recover import Recovered, Step, recover
from quantflow.ptq.smoothquant.smoothquant import smooth
from quantflow.ptq.weight_reconstruction.weight_reconstruction import compensate
from quantflow.simulation.output_gradients import Sensitivity, sensitivity

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
