"""Calibration and training under torchrun, on GPUs where there are any; each process tells what it ends with."""

import hashlib
import sys

import torch
import torch.distributed as dist
from process_networks import batches, captured
from processes import tell

import quantflow as qf
from quantflow import distributed
from quantizers import XNNPACKQuantizer


def digest(tensors):
    """What is equal where all tensors are, to the bit."""
    told = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        told.update(f"{name} {tensor.cpu().tolist()}".encode())
    return told.hexdigest()


def main():
    device = distributed.init_process_group(timeout=120)
    if sys.argv[1] == "nccl":  # which takes nothing of the CPU
        dist.destroy_process_group()
        dist.init_process_group("nccl")
    torch.set_num_threads(1)
    rank = distributed.rank()
    mine = batches(2, first=2 * rank)
    graph = qf.prepare(captured().to(device), XNNPACKQuantizer(), qat=True)
    qf.calibrate(graph, mine, sample=qf.Sample(4), progress=False)
    starts = digest({name: value for name, value in graph.state_dict().items() if name.endswith(".scale")})
    # The pieces of several processes also where there is one.
    low, high = distributed.widest(torch.tensor([-1.0 - rank]), torch.tensor([2.0 + rank]))
    with distributed.SynchronizedBatchNorm():
        graph.train()(mine[0][0].to(device)).sum().backward()
    graph.zero_grad()
    history = qf.train(graph, mine, epochs=2, lr=0.01, validate=lambda g: float(rank), amp=False, progress=False)
    state = digest(graph.state_dict())
    figures = {"loss": history.loss, "metric": history.metric, "range": [low.item(), high.item()]}
    tell(rank=rank, device=device.type, backend=dist.get_backend_config(), starts=starts, state=state, **figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
