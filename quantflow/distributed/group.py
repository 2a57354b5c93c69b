"""The group of processes: who is in it, and of which devices its backend takes tensors."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from quantflow.errors import QuantflowError


def grouped() -> bool:
    """Whether there is a group of processes, if only of one."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many processes work together; 1 alone."""
    return dist.get_world_size() if grouped() else 1


def rank() -> int:
    """Which of them this is; 0 alone, and 0 writes the files."""
    return dist.get_rank() if grouped() else 0


def init_process_group(*, timeout: float | None = None) -> torch.device:
    """Join the processes that ``torchrun`` started, with a backend for tensors of every device here.

    Args:
        timeout: Seconds that a process waits for the others before it ends in an error that names those missing. By default
            torch's own, 30 minutes.

    Returns:
        The device of this process: a GPU of its own where there are GPUs, else the CPU.

    Raises:
        QuantflowError: at stage ``"distributed"``, when ``torchrun`` did not start this process or there are too few GPUs.
    """
    if not dist.is_torchelastic_launched():
        remedy = "torchrun --nproc-per-node N script.py, or torch.distributed.init_process_group"
        raise QuantflowError(
            "distributed", "this process was not started by torchrun", node="environment", remedy=remedy
        )
    bound = None if timeout is None else timedelta(seconds=timeout)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=bound)
        return torch.device("cpu")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        reason, remedy = f"there are {gpus} GPUs for more processes", f"--nproc-per-node {gpus}, or hide the GPUs"
        raise QuantflowError("distributed", reason, node=f"LOCAL_RANK {local}", remedy=remedy)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    # Observers and figures may lie on either.
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=bound)
    return device


def carried_devices() -> tuple[str, ...]:
    """The types of the devices whose tensors the group's backend takes: ``("cuda",)`` with NCCL alone."""
    return tuple(pair.partition(":")[0] for pair in dist.get_backend_config().split(","))


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` where the group's backend takes it: as it is, or moved to the first device that will do."""
    kinds = carried_devices()
    if tensor.device.type in kinds:
        return tensor
    return tensor.to(torch.device(kinds[0], torch.accelerator.current_device_index()) if kinds[0] != "cpu" else "cpu")


def check_carries(device: torch.device, stage: str) -> None:
    """Refuse to work on ``device`` where the group's backend takes none of its tensors.

    Raises:
        QuantflowError: at ``stage``.
    """
    if grouped() and device.type not in carried_devices():
        reason = f"the group's backend ({dist.get_backend_config()}) takes no tensors of this device"
        remedy = "quantflow.distributed.init_process_group(), which takes both, or pass device="
        raise QuantflowError(stage, reason, node=str(device), remedy=remedy)
