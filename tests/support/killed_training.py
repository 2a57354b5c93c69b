"""Small trainings, each in a process of its own, for the test that kills them.

Reads folders, a line each. For each it forks a training, which prints its process id and then a word at each step, and prints
the exit code at its end. A fork spares each training the seconds that the imports take.
"""

import os
import sys
import time
from pathlib import Path

import torch
from networks import ConvNet
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import quantflow as qf
from quantizers import XNNPACKQuantizer


def loss(output, target):
    print("step", flush=True)
    time.sleep(0.01)
    return torch.nn.functional.cross_entropy(output, target)


def train(folder):
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 5
    graph = qf.export(ConvNet(p=0.3), (images[:2],), dynamic_batch=True).module()
    graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    optimizer = torch.optim.AdamW(graph.parameters(), 1e-2)
    loader = DataLoader(TensorDataset(images, labels), 4, shuffle=True, generator=torch.Generator())
    checkpoints = qf.Checkpoints(folder / "checkpoints", every=1)
    qf.train(graph, loader, epochs=6, loss=loss, optimizer=optimizer, ema=0.9, checkpoints=checkpoints, progress=False)
    save_file({k: v.clone() for k, v in graph.state_dict().items()}, folder / "weights.safetensors")
    program = qf.export(qf.convert(graph), (images[:1],)).to_core_aten().to_edge("xnnpack").to_executorch()
    program.save(folder / "model.pte")


def main():
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            print(os.getpid(), flush=True)
            train(Path(line.strip()))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
