"""A calibration under torchrun (or alone), for the test that compares the two."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from networks import ConvNet, randomize_statistics
from safetensors.torch import save_file

import quantflow as qf
from quantflow import distributed
from quantizers import Scheme, TensorScheme, XNNPACKQuantizer


def main():
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(42, 3, 16, 16)
    graph = qf.export(randomize_statistics(ConvNet()).eval(), (images[:2],), dynamic_batch=True).module()
    sample = qf.Sample(12)
    share = images[distributed.rank() :: distributed.world_size()]  # of unequal numbers of batches
    prepared = qf.prepare(graph, XNNPACKQuantizer(Scheme(activation=TensorScheme(observer=sys.argv[2]))))
    qf.calibrate(prepared, share.split(4), sample=sample, progress=False)
    state = {k: v.clone() for k, v in prepared.state_dict().items()}
    state["drawn"] = torch.cat([batch[0] for batch in sample.batches()])
    recovered = qf.recover(prepared, sample, progress=False).graph
    state |= {f"recovered.{k}": v.clone() for k, v in recovered.state_dict().items()}
    save_file(state, Path(sys.argv[1]) / f"{distributed.world_size()}-{distributed.rank()}.safetensors")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
