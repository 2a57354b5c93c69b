"""The operators that XNNPACK does not run in int8, with the reasons that a plan shows.

These are limits of executorch's XNNPACK delegate (1.5). The plan's forecast shows which of them it runs in float.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from quantflow.graph.aten import aten

_FLOAT = "XNNPACK has it in float only"
_NONE = "XNNPACK has no kernel for it, in int8 or float"
_SLOW = "XNNPACK's int8 kernel for it is many times slower than float"
_STEEP = "eight bits are too few for such a steep function"
_STATISTICS = "eight bits are too few for its sums of squares; it is computed in float"
_SOFTMAX = "XNNPACK has softmax in float only, over the last dimension"
_RECURRENT = "it is unrolled into its time steps, in float"

XNNPACK_UNSUPPORTED: Mapping[object, str] = {
    operator.getitem: "part of a result that stays in float",
    aten.upsample_bilinear2d.vec: "XNNPACK resizes bilinearly in float only",
    aten.avg_pool2d.default: "int8 averages are over images, of known size where windows reach over the edge",
    aten.pow.Tensor_Scalar: "XNNPACK has squares in float only, and no other powers",
    aten.selu.default: "XNNPACK's elu has no scales",
    aten.einsum.default: "no rule for einsum; a matmul would have one",
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), _SOFTMAX),
    **dict.fromkeys((aten.exp.default, aten.sqrt.default), _STEEP),
    **dict.fromkeys((aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input), _RECURRENT),
    **dict.fromkeys((aten.div.Tensor, aten.maximum.default, aten.minimum.default), _SLOW),
    **dict.fromkeys((aten.max.other, aten.min.other), _SLOW),
    **dict.fromkeys((aten.sin.default, aten.cos.default, aten.log.default, aten.rsqrt.default), _FLOAT),
    **dict.fromkeys((aten.ceil.default, aten.floor.default), _FLOAT),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_bicubic2d.vec, aten.grid_sampler.default), _NONE),
    **dict.fromkeys((aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default), _STATISTICS),
    **dict.fromkeys((aten.rms_norm.default, aten.linalg_vector_norm.default), _STATISTICS),
    **dict.fromkeys((aten.log_softmax.int, aten.where.self, aten.masked_fill.Scalar), _NONE),
    **dict.fromkeys((aten.expand.default, aten.roll.default, aten.cumsum.default, aten.embedding.default), _NONE),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default), _NONE),
}
