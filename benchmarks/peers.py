"""The tools that quantflow is compared with: torchao's PT2E and NNCF, both with executorch's quantizer and partitioner."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import quantflow as qf


def captured(model: nn.Module, example: Sequence[torch.Tensor]) -> GraphModule:
    """The graph that both tools start from, for batches of any size."""
    batch = torch.export.Dim("batch")
    several = tuple(torch.cat([x, x]) for x in example)  # torch.export would specialize a batch of one
    return torch.export.export(model, several, dynamic_shapes=(({0: batch},) * len(several))).module()


def stock_quantizer(*, min_max: bool = False, qat: bool = False, bits: int = 8) -> Any:
    """Executorch's XNNPACKQuantizer with per-channel weights of so many bits.

    Activations have histogram or min-max observers or, with ``qat``, fake quantizers.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as stock
    from torchao.quantization.pt2e import MinMaxObserver

    top = 2 ** (bits - 1)
    limits = {} if bits == 8 else {"weight_qmin": -top, "weight_qmax": top - 1}
    config = stock.get_symmetric_quantization_config(is_per_channel=True, is_qat=qat, **limits)
    if min_max:
        observer = MinMaxObserver.with_args(eps=2**-12)
        extremes = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=observer)
        config = dataclasses.replace(config, input_activation=extremes, output_activation=extremes)
    return stock.XNNPACKQuantizer().set_global(config)


def stock_prepared(model: nn.Module, example: Sequence[torch.Tensor], *, min_max: bool = False) -> GraphModule:
    """The graph prepared by stock PT2E."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    return prepare_pt2e(captured(model, example), stock_quantizer(min_max=min_max))


def stock_qat(model: nn.Module, example: Sequence[torch.Tensor], *, bits: int = 8) -> GraphModule:
    """The graph prepared by stock PT2E for QAT, with per-channel weights of so many bits."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    return prepare_qat_pt2e(captured(copy.deepcopy(model).train(), example), stock_quantizer(qat=True, bits=bits))


@torch.no_grad()
def stock_calibrate(prepared: GraphModule, batches: Sequence[torch.Tensor]) -> None:
    for batch in batches:
        prepared(batch)


def nncf_quantized(model: nn.Module, example: Sequence[torch.Tensor], batches: Sequence[torch.Tensor]) -> GraphModule:
    """The converted graph of NNCF with its defaults and executorch's quantizer.

    It reads every image, one at a time, as NNCF's documentation recommends.
    """
    import nncf
    from nncf.experimental.torch.fx import quantize_pt2e

    images = [image for batch in batches for image in batch.split(1)]
    dataset = nncf.Dataset(images)
    return quantize_pt2e(captured(model, example), stock_quantizer(), dataset, subset_size=len(images))


def stock_lowered(converted: GraphModule, example: Sequence[torch.Tensor]) -> qf.Program:
    """``converted`` lowered by executorch with its XNNPACK partitioner."""
    from executorch import exir
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    exported = torch.export.export(converted, tuple(example))
    edge = exir.to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return qf.Program.from_buffer(edge.to_executorch().buffer)
