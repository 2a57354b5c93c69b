"""What two processes do together, case by case, for the tests that read the outcome: one JSON line a case."""

import itertools
import sys
import tempfile
import traceback
import warnings

import guarded_collectives
import process_training
import torch
import torch.distributed as dist
from process_networks import Unsized, batches, captured, prepared, ranges
from processes import tell, together

import quantflow as qf
from quantflow.observers import MovingAverageMinMaxObserver
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer

RANK = 0


def trained(data, **options):
    graph = prepared(qat=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = qf.train(graph, data, lr=0.01, progress=False, **options)
    said = [str(w.message) for w in caught if isinstance(w.message, qf.QuantflowWarning)]
    return {"loss": history.loss, "metric": history.metric, "best": history.best_epoch, "said": said} | ranges(graph)


def unequal_shares():
    return trained(batches(5 if RANK == 0 else 3), epochs=2)


def unequal_shares_without_length():
    return trained(Unsized(batches(2 if RANK == 0 else 4)), epochs=2)


def validate_differs():
    figures = itertools.count() if RANK else itertools.count(0, -3)  # together they fall
    return trained(batches(2), epochs=5, patience=2, validate=lambda graph: float(next(figures)))


def calibration_of_unequal_shares(observer="moving_average", **options):
    graph = prepared(observer)
    mine = batches(2) if RANK else batches(5, first=2)
    qf.calibrate(graph, mine, progress=False, **options)
    return ranges(graph)


def calibration_with_patience():
    return calibration_of_unequal_shares(patience=1)


def calibration_before_training():
    graph = prepared(qat=True)
    qf.calibrate(graph, batches(2, first=2 * RANK), progress=False)
    watching = {n: m.calibrator.max_val.item() for n, m in graph.named_modules() if getattr(m, "calibrator", None)}
    return {"watching": watching} | ranges(graph)


def no_number_in_one_process():
    graph = prepared()
    data = batches(2)
    if RANK == 1:
        data[1][0][0, 0, 0, 0] = float("nan")
    qf.calibrate(graph, data, progress=False)
    try:
        qf.convert(graph)
    except qf.QuantflowError as error:
        return {"said": str(error)}
    return {"said": None}


def one_process_without_data():
    try:
        qf.calibrate(prepared(), batches(2 * RANK), progress=False)
    except qf.QuantflowError as error:
        return {"said": str(error)}
    return {"said": None}


def rank_0_looks_alone():
    """A grid that is each input's own asks nobody."""
    graph = prepared(quantizer=XNNPACKQuantizer(DYNAMIC_INT8), qat=True).eval()
    return {"finite": bool(graph(batches(1)[0][0]).isfinite().all()) if RANK == 0 else True}


def nothing_in_one_process():
    observer = MovingAverageMinMaxObserver()
    for x in (torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 5.0])):
        observer.observe_together(x if RANK else x[:0])
    observer.observe_together(torch.empty(0))
    return {"range": [observer.min_val.item(), observer.max_val.item(), observer.count.item()]}


def figures_of_torchao():
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer as Stock,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        get_symmetric_quantization_config,
    )

    graph = prepared(quantizer=Stock().set_global(get_symmetric_quantization_config()))
    try:
        qf.calibrate(graph, batches(2), progress=False)
    except qf.QuantflowError as error:
        return {"said": str(error)}
    return {"said": None}


def refused(**options):
    try:
        qf.train(prepared(qat=True), batches(2), progress=False, **options)
    except qf.QuantflowError as error:
        return {"said": str(error)}
    return {"said": None}


def other_options():
    return refused(epochs=2 + RANK)


def checkpoints_that_one_process_sees():
    with tempfile.TemporaryDirectory() as folder:
        # A folder of each process's own: rank 0 alone has written into its.
        given = {"epochs": 1, "lr": 0.01, "checkpoints": qf.Checkpoints(folder)}
        qf.train(prepared(qat=True), batches(2), progress=False, **given)
        return refused(**given)


def a_device_that_the_group_does_not_carry():
    config = dist.get_backend_config
    dist.get_backend_config = lambda: "cuda:nccl"
    try:
        return refused()
    finally:
        dist.get_backend_config = config


def guarded():
    """All that goes over the group, under the guard. It stays up: the last case."""
    used = guarded_collectives.install()
    refused = False
    try:
        dist.all_reduce(torch.ones(2))
    except RuntimeError:
        refused = True
    used.clear()
    graph = prepared(qat=True)
    qf.calibrate(graph, batches(2, first=2 * RANK), sample=qf.Sample(4), progress=False)
    qf.train(graph, batches(2, first=2 * RANK), validate=lambda g: 1.0, ema=0.9, progress=False)
    prepared_again = prepared("mse")
    qf.calibrate(prepared_again, batches(2, first=2 * RANK), progress=False)
    calibration_of_unequal_shares()
    return {"refused": refused, "used": sorted(set(used))} | ranges(graph)


CASES = (
    unequal_shares,
    unequal_shares_without_length,
    validate_differs,
    calibration_of_unequal_shares,
    calibration_with_patience,
    calibration_before_training,
    no_number_in_one_process,
    one_process_without_data,
    rank_0_looks_alone,
    nothing_in_one_process,
    figures_of_torchao,
    other_options,
    checkpoints_that_one_process_sees,
    a_device_that_the_group_does_not_carry,
    *process_training.CASES,
    guarded,
)


def work(rank):
    global RANK
    RANK = rank
    wanted = sys.argv[1:]
    for case in CASES:
        if wanted and case.__name__ not in wanted:
            continue
        try:
            outcome = case()
        except Exception:
            outcome = {"error": traceback.format_exc()[-2000:]}
        tell(case=case.__name__, rank=rank, **outcome)


def main():
    torch.set_num_threads(1)
    captured()
    together(work, limit=60)


if __name__ == "__main__":
    main()
