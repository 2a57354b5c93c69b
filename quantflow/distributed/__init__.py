"""Collective operations, synchronized batch norm and error reports for the default group of torch.distributed.

In a single process, each of these does nothing and costs nothing.
"""

from quantflow.distributed.batch_norm import SynchronizedBatchNorm
from quantflow.distributed.collectives import gathered, total, widest
from quantflow.distributed.group import check_carries, grouped, init_process_group, rank, world_size
from quantflow.distributed.peers import Peers

__all__ = [
    "Peers",
    "SynchronizedBatchNorm",
    "check_carries",
    "gathered",
    "grouped",
    "init_process_group",
    "rank",
    "total",
    "widest",
    "world_size",
]
