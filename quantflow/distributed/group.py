"""The process group: its size and ranks, and the devices that its backend supports."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from quantflow.errors import QuantflowError


def grouped() -> bool:
    """Whether a process group is initialized, also one of a single process."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes in the group; 1 without a group."""
    return dist.get_world_size() if grouped() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a group. Rank 0 writes the files."""
    return dist.get_rank() if grouped() else 0


def init_process_group(*, timeout: float | None = None) -> torch.device:
    """Join the processes that ``torchrun`` started, with a backend for tensors of every device here.

    Args:
        timeout: Seconds that a process waits for the others before it ends in an error that names those missing. By default
            torch's own, 30 minutes.

    Returns:
        The device of this process: a separate GPU if there are GPUs, else the CPU.

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
        reason, remedy = f"there are more processes than {gpus} GPUs", f"--nproc-per-node {gpus}, or hide the GPUs"
        raise QuantflowError("distributed", reason, node=f"LOCAL_RANK {local}", remedy=remedy)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    # Observers and metrics may be on either device.
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=bound)
    return device


def carried_devices() -> tuple[str, ...]:
    """Return the device types that the group's backend supports: ``("cuda",)`` with NCCL alone."""
    return tuple(pair.partition(":")[0] for pair in dist.get_backend_config().split(","))


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` on a device that the group's backend supports: unchanged, or moved to the first such device."""
    kinds = carried_devices()
    if tensor.device.type in kinds:
        return tensor
    return tensor.to(torch.device(kinds[0], torch.accelerator.current_device_index()) if kinds[0] != "cpu" else "cpu")


def check_carries(device: torch.device, stage: str) -> None:
    """Check that the group's backend supports tensors on ``device``.

    Raises:
        QuantflowError: at ``stage``, when it does not.
    """
    if grouped() and device.type not in carried_devices():
        reason = f"the group's backend ({dist.get_backend_config()}) takes no tensors of this device"
        remedy = "call quantflow.distributed.init_process_group(), which supports both, or pass device="
        raise QuantflowError(stage, reason, node=str(device), remedy=remedy)
