"""Trainings and calibrations in which one process goes wrong, and what the others say of it."""

import functools
import os
import signal
import sys
import time

import torch
from process_networks import batches, captured, prepared
from processes import tell, together
from torch.nn import functional as F

import quantflow as qf
from quantflow.distributed import peers

SILENCE, BOUND = 12, 16  # seconds, instead of 30 and 1800: longer than a busy machine keeps a process waiting


def wrong(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hung":
        time.sleep(300)
    raise ValueError("a fault of its own")


def work(rank, *, case, where, how, culprit):
    steps = [0]

    def data():
        for index, batch in enumerate(batches(4)):
            if rank == culprit and where in ("data", "calibrate") and index == 2:
                wrong(how)
            yield batch

    def loss(output, target):
        steps[0] += 1
        if rank == culprit and where == "step" and steps[0] == 3:
            wrong(how)
        return F.cross_entropy(output, target)

    def validate(graph):
        if rank == culprit and where == "validate":
            wrong(how)
        return 0.0

    start = time.monotonic()
    try:
        if where == "calibrate":
            qf.calibrate(prepared(), data(), progress=False)
        else:
            qf.train(prepared(qat=True), data(), loss=loss, validate=validate, progress=False)
    except qf.QuantflowError as error:
        seconds = time.monotonic() - start
        tell(case=case, rank=rank, stage=error.stage, node=error.node, reason=error.reason, seconds=seconds)
        time.sleep(3)  # the others see its silence, not its end
    except ValueError as error:
        tell(case=case, rank=rank, own=str(error))


def main():
    torch.set_num_threads(1)
    captured()
    peers._SILENCE, peers._BEAT = SILENCE, 0.5
    for case in sys.argv[1:]:
        where, how, culprit = case.split("-")
        given = {"case": case, "where": where, "how": how, "culprit": int(culprit)}
        together(functools.partial(work, **given), count=3, limit=20, bound=BOUND)


if __name__ == "__main__":
    main()
