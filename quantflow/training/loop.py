"""``train``: the training loop for graphs prepared for QAT and for any captured graph."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from quantflow import distributed
from quantflow.conversion.convert import convert
from quantflow.data.batches import PickInputs
from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import has_seen_data, observers_of
from quantflow.observers.synchronization import check_synchronizable_in_training
from quantflow.preparation.forms import make_trainable
from quantflow.simulation.float_weights import forget_float_weights, has_teacher, remember_float_weight
from quantflow.training.checkpoint import Checkpoints
from quantflow.training.distillation import Distillation
from quantflow.training.epochs import Epochs
from quantflow.training.fine_tuning import fine_tuning, teacher_of
from quantflow.training.grid_adam import GridAdam
from quantflow.training.history import History
from quantflow.training.parallel import BatchLoss, Loss, in_parallel
from quantflow.training.preconditions import check_alike, check_can_learn
from quantflow.training.schedule import Schedule
from quantflow.training.state import TrainingState
from quantflow.training.updates import check_usable, end_epoch_on_plateau, update

Validate = Callable[[TrainableGraphModule], float]


def train(
    graph: TrainableGraphModule,
    data: Iterable[object],
    *,
    epochs: int = 1,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    scheduler: LRScheduler | None = None,
    schedule: Schedule | None = None,
    distill: Distillation | Literal["auto"] | None = "auto",
    clip_norm: float | None = None,
    ema: float | None = None,
    amp: bool = False,
    compile: bool = False,
    validate: Validate | None = None,
    validate_converted: bool = False,
    patience: int | None = None,
    checkpoints: Checkpoints | None = None,
    seed: int = 0,
    inputs: PickInputs | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> History:
    """Train ``graph`` on ``(inputs, target)`` batches with ``loss(output, target).backward()`` on the graph itself.

    Under ``torchrun`` the processes train as one: gradients are averaged, batch norm and observers see all batches, and the
    process of rank 0 writes. Give each its part of the data (``torch.utils.data.DistributedSampler``); an epoch ends with the
    shortest part, and a warning says so. A process that fails, is killed or hangs ends the others in an error that names it
    (:class:`quantflow.distributed.Peers`).

    Args:
        graph: A captured graph, prepared with ``qat=True`` to train with fake quantization. A graph that was prepared for PTQ
            and calibrated (and recovered) trains from its weights and ranges: its observers become fake quantizers. Trained in
            place; left in inference mode.
        data: A loader of ``(inputs, target)`` batches, iterated once an epoch. For a run to be repeatable its order must
            follow from torch's random state (a shuffling DataLoader does) or from its own ``generator``, which is seeded anew
            each epoch.
        epochs: The number of epochs.
        loss: ``loss(output, target)``, a scalar tensor; by default cross-entropy, or none where a recovered graph learns from
            its float network.
        optimizer: By default SGD with momentum 0.9 at ``lr``. For a graph that :func:`quantflow.recover` returned, and
            without ``lr``, Adam with learning rates in steps of the grid, which follow from the number of steps, and a warm-up;
            it freezes weights that oscillate between two integers (Nagel et al. 2022, arXiv:2203.11086).
        lr: Learning rate of SGD, 1e-3 by default.
        scheduler: A learning rate scheduler, stepped after each batch; ``ReduceLROnPlateau`` after each epoch, with what
            ``validate`` gave (mode "max") or with the mean loss (mode "min"). By default the default optimizer decays along a
            cosine to zero where ``data`` has a length, and an optimizer that is given has none.
        schedule: When rounding starts and batch norm and observers freeze; by default ``Schedule()`` for a graph prepared for
            QAT, ``Schedule.never()`` for one in float. A graph that learns from its teacher by default is trained in inference
            mode, without a schedule: dropout is off, batch norm and ranges stay.
        distill: Learn from a teacher besides; with a weight of 1 from the teacher alone, from batches with or without targets.
            By default a graph that :func:`quantflow.recover` returned learns from its own float network, from this alone
            unless ``loss`` is given; other graphs have no teacher.
        clip_norm: The largest norm of all gradients together; None for no limit.
        ema: Decay of an exponential moving average of the parameters, which is what is validated and kept; None for none.
        amp: Mixed precision: float16 with gradient scaling on CUDA, bfloat16 elsewhere.
        compile: Run forward and backward through ``torch.compile``.
        validate: Called with the graph in inference mode before the first step and after each epoch; higher is better. The
            state with the best value is kept, that of the start included: training never ends below it. Of several processes
            each calls it, on data of its own or on all, and the mean over them counts.
        validate_converted: Call ``validate`` with the converted graph as well.
        patience: Stop after so many epochs without a better value of ``validate``; None to go on.
        checkpoints: Save the run as it goes, and resume it: killed at any moment and started again with the same arguments,
            it ends with the same bits on a CPU.
        seed: The seed of data order, dropout and augmentation.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        device: Where to train; by default where the graph's parameters are.
        progress: Show a progress bar.

    Returns:
        The losses and metrics of all epochs.

    Raises:
        QuantflowError: at stage ``"train"``, when the graph is not calibrated, is converted or has no parameters to train,
            there is no data or target, the loss stops being a number, the optimizer or scheduler can't be used (or saved, with
            ``checkpoints``), or another process fails.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
        >>> graph = qf.export(model, (torch.randn(2, 3, 8, 8),), dynamic_batch=True).module()
        >>> graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
        >>> data = [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)]
        >>> history = qf.train(graph, data, epochs=2, lr=1e-2, progress=False)
        >>> len(history.loss), graph.training
        (2, False)
    """
    with distributed.Peers("train") as peers:
        if not isinstance(graph, TrainableGraphModule):
            remedy = "train Exported.module(), or what qf.prepare(..., qat=True) returned"
            raise QuantflowError("train", f"{type(graph).__name__} is no captured graph", node="graph", remedy=remedy)
        make_trainable(graph)
        check_can_learn(graph)
        check_synchronizable_in_training(graph)
        there = torch.device(device or next((p.device for p in graph.parameters()), "cpu"))
        distributed.check_carries(there, "train")
        graph.to(there)
        trained = has_teacher(graph)
        follows_teacher = trained and distill == "auto"
        in_training_mode = schedule is not None or not follows_teacher  # else no dropout: the teacher has none
        if schedule is None:
            schedule = Schedule() if any(isinstance(m, FakeQuantize) for m in graph.modules()) else Schedule.never()
        average = AveragedModel(graph, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema is not None else None
        scaler = torch.amp.GradScaler(there.type, enabled=amp and there.type == "cuda")
        autocast_dtype = torch.float16 if there.type == "cuda" else torch.bfloat16
        synchronized = distributed.SynchronizedBatchNorm() if distributed.world_size() > 1 else contextlib.nullcontext()
        frozen = graph.batch_norm_frozen
        switched: tuple[bool, ...] | None = None
        source = Epochs(data, inputs, there, seed)
        if distill == "auto":
            distill = teacher_of(graph, alone=loss is None) if follows_teacher else None
        loss = F.cross_entropy if loss is None else loss
        before = forget_float_weights(graph)  # what training makes of them is what PTQ is measured against

        def save(*, ended: bool) -> None:
            if checkpoints is None:
                return
            if run.step == 1:
                run.check_can_be_saved()  # the optimizer has a state only after its first step
            if not ended and run.step % checkpoints.every:
                return
            tensors, plain = run.saved()  # a collective call: each process has its own random state
            if distributed.rank() == 0:
                checkpoints.save(run.step, tensors, {**plain, "fingerprint": fingerprint})

        source.agree(peers)
        total = source.steps * epochs if source.steps else None
        if optimizer is None and lr is None and trained:
            optimizer, default = fine_tuning(graph, total)
            scheduler = scheduler or default
        elif optimizer is None:
            optimizer = torch.optim.SGD(graph.parameters(), lr=1e-3 if lr is None else lr, momentum=0.9)
            if scheduler is None and total:
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        run = TrainingState(graph, optimizer, scheduler, scaler, average)
        check_usable(run, validated=validate is not None, saved=checkpoints is not None)
        options = (epochs, source.steps, schedule.to_json(), ema, amp, seed, distributed.world_size())
        fingerprint = run.fingerprint(*options)
        source.start(run)
        if checkpoints is not None and checkpoints.resume and (found := checkpoints.last_good(fingerprint)) is not None:
            run.restore(*found)
            run.history.resumed_at.append(run.step)
        check_alike(peers.answers([fingerprint, run.step]))
        try:
            if validate is not None and not run.step:
                _score_start(run, peers, validate)
            with tqdm(
                desc="train",
                total=total,
                initial=run.step,
                unit="step",
                disable=not progress or distributed.rank() > 0,
                leave=False,
            ) as bar:
                teacher_alone = distill is not None and distill.weight == 1.0
                batch_loss = BatchLoss(graph, None if teacher_alone else loss, compile=compile)
                forward = in_parallel(batch_loss, graph, there, schedule)
                while run.epoch < epochs and not _exhausted(run, patience):
                    graph.train(in_training_mode)
                    switched = None
                    # Validation and conversion need the graph without recorders.
                    with distill.attached(graph) if distill is not None else contextlib.nullcontext() as mixed:
                        batch_loss.mixed = mixed
                        for batch in source.batches(run, peers):
                            at = run.step / total if total else run.epoch / epochs
                            if switched != schedule.state(at):
                                schedule.apply(graph, at, frozen=frozen)
                                switched = schedule.state(at)
                            with torch.autocast(there.type, dtype=autocast_dtype, enabled=amp), synchronized:
                                value = forward(batch, run.batch)
                            update(run, value, clip_norm)
                            bar.update()
                            save(ended=False)
                    _end_epoch(run, peers, validate, validate_converted)
                    if run.history.metric:
                        bar.set_postfix(metric=f"{run.history.metric[-1]:.4f}")
                    save(ended=True)
        finally:
            Schedule.never().apply(graph, 0.0, frozen=frozen)
            graph.eval()
        _keep_best(run)
        if not run.step or run.history.best_epoch == -1:
            for read, weight in before.items():
                remember_float_weight(read, weight)
    return run.history


def _score_start(run: TrainingState, peers: distributed.Peers, validate: Validate) -> None:
    """Make the state before the first step a candidate for the best."""
    run.graph.eval()
    with torch.no_grad():
        metric = statistics.fmean(peers.answers(float(validate(run.graph))))
    run.history.start_metric = metric
    usable = not math.isnan(metric) and all(map(has_seen_data, observers_of(run.graph).values()))
    run.keep(run.graph, metric if usable else float("-inf"), -1)


def _end_epoch(run: TrainingState, peers: distributed.Peers, validate: Validate | None, converted: bool) -> None:
    run.history.loss.append(statistics.fmean(peers.answers(run.loss_sum / max(run.batch, 1))))
    if isinstance(run.optimizer, GridAdam):
        run.history.frozen_weights.append(run.optimizer.frozen_share())
    run.graph.eval()
    if validate is not None:
        kept = _averaged(run)
        with torch.no_grad():
            figures = [float(validate(kept))]
            if converted and observers_of(kept):
                figures.append(float(validate(convert(kept))))
        metric, *rest = map(statistics.fmean, zip(*peers.answers(figures), strict=True))
        run.history.metric.append(metric)
        run.history.converted_metric += rest
        if metric > run.best_metric or (run.history.best_epoch == -1 and metric == run.best_metric):
            run.keep(kept, metric, run.epoch)
    end_epoch_on_plateau(run)
    run.epoch, run.batch, run.loss_sum = run.epoch + 1, 0, 0.0


def _averaged(run: TrainingState) -> TrainableGraphModule:
    """The graph with averaged parameters, in inference mode, or the graph itself."""
    if run.average is None:
        return run.graph
    averaged = copy.deepcopy(run.graph)
    averaged.load_state_dict(run.average.module.state_dict())
    return averaged.eval()


def _keep_best(run: TrainingState) -> None:
    if run.best is not None:
        run.graph.load_state_dict(run.best)
    elif run.average is not None:
        run.graph.load_state_dict(run.average.module.state_dict())


def _exhausted(run: TrainingState, patience: int | None) -> bool:
    best = run.history.best_epoch
    return patience is not None and best is not None and run.epoch > 0 and run.epoch - 1 - best >= patience
