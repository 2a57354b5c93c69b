"""Several processes as one: what they agree on, in torch.distributed's default group.

Alone, each of these does nothing and costs nothing.
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
