"""Recovery: winning back what post-training quantization loses.

Passes over a graph, each a copy in, a copy out, for any torchao quantizer: over the float graph before it is prepared
(:func:`equalize`, :func:`smooth`), over the prepared and calibrated graph the others. :func:`recover` tries those that need
no choice of a person's and keeps what helps.
"""

from quantflow.data.sample import Sample
from quantflow.ptq.adaptive_rounding.adaround import adaround
from quantflow.ptq.bias_correction.bias_correction import correct_bias
from quantflow.ptq.equalization.equalization import equalize
from quantflow.ptq.range_optimization import optimize_ranges
from quantflow.ptq.recover import RecoveryResult, Step, recover
from quantflow.ptq.smoothquant.smoothquant import smooth
from quantflow.ptq.weight_reconstruction.weight_reconstruction import reconstruct_weights
from quantflow.simulation.output_gradients import OutputGradients, output_gradients

__all__ = [
    "OutputGradients",
    "RecoveryResult",
    "Sample",
    "Step",
    "adaround",
    "correct_bias",
    "equalize",
    "optimize_ranges",
    "output_gradients",
    "reconstruct_weights",
    "recover",
    "smooth",
]
