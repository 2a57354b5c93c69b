"""Recovery: winning back what post-training quantization loses.

Passes over a prepared and calibrated graph, each a copy in, a copy out, for any torchao quantizer; :func:`recover` tries them
and keeps what helps.
"""

from quantflow.recovery.compensation import compensate
from quantflow.recovery.ranges import settle_ranges
from quantflow.recovery.recover import Recovered, Step, recover
from quantflow.recovery.sample import Sample
from quantflow.recovery.sensitivity import Sensitivity, sensitivity

__all__ = ["Recovered", "Sample", "Sensitivity", "Step", "compensate", "recover", "sensitivity", "settle_ranges"]
