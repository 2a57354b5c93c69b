"""PTQ algorithms: they reduce the error of post-training quantization.

Each algorithm returns a changed copy of its graph and works with any torchao quantizer. :func:`equalize` and :func:`smooth`
take the float graph before it is prepared, the others a prepared and calibrated graph. :func:`recover` tries those that need
no options and keeps what improves the outputs.
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
