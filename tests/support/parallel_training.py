"""A small training under torchrun (or alone), for the test that compares the two."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from networks import ConvNet
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import quantflow as qf
from quantflow import distributed
from quantizers import XNNPACKQuantizer


class Alternate(torch.utils.data.Sampler):
    """Every ``world``-th image from ``rank`` on, so that all processes together see the batches of one."""

    def __init__(self, size):
        self.order = range(distributed.rank(), size, distributed.world_size())

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


def main():
    folder, die_at = Path(sys.argv[1]), int(sys.argv[2])
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 5
    graph = qf.export(ConvNet(p=0.0), (images[:2],), dynamic_batch=True).module()
    graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    seen = [0]

    def loss(output, target):
        seen[0] += 1
        if seen[0] == die_at and distributed.rank() == 1:
            sys.exit(3)
        return torch.nn.functional.cross_entropy(output, target)

    loader = DataLoader(TensorDataset(images, labels), 8 // distributed.world_size(), sampler=Alternate(32))
    checkpoints = qf.Checkpoints(folder / "checkpoints", every=1)
    history = qf.train(graph, loader, epochs=4, lr=0.05, loss=loss, checkpoints=checkpoints, progress=False)
    state = {k: v.clone() for k, v in graph.state_dict().items()}
    save_file(state, folder / f"weights-{distributed.world_size()}-{distributed.rank()}.safetensors")
    if distributed.rank() == 0:
        (folder / "resumed.txt").write_text(str(history.resumed_at))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
