"""Backend quantizers: tables of rules for ATen operators, independent of the edge dialect and of executorch."""

from quantizers.decision import Decision
from quantizers.kernels import FloatKernels
from quantizers.override import Override
from quantizers.partition_forecast import Forecast
from quantizers.plan import Plan
from quantizers.rule import Rule
from quantizers.rule_quantizer import RuleQuantizer
from quantizers.scheme import DYNAMIC_INT8, DYNAMIC_W4, INT8, W4A8, Scheme, TensorScheme
from quantizers.xnnpack import XNNPACK_RULES, XNNPACKQuantizer

__all__ = [
    "DYNAMIC_INT8",
    "DYNAMIC_W4",
    "INT8",
    "W4A8",
    "XNNPACK_RULES",
    "Decision",
    "FloatKernels",
    "Forecast",
    "Override",
    "Plan",
    "Rule",
    "RuleQuantizer",
    "Scheme",
    "TensorScheme",
    "XNNPACKQuantizer",
]
