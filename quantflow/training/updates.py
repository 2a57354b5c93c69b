"""The optimizer and the scheduler of a training run: their checks and their steps."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from quantflow.errors import QuantflowError
from quantflow.training.state import TrainingState


def check_usable(run: TrainingState, *, validated: bool, saved: bool) -> None:
    """Raise, before the first step, for an optimizer or scheduler that the run can't step or, with checkpoints, can't save.

    Raises:
        QuantflowError: at stage ``"train"``.
    """
    closure = inspect.signature(type(run.optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        reason, remedy = (
            "it evaluates the loss several times a step",
            "use a first-order optimizer, as torch.optim.AdamW",
        )
        raise QuantflowError("train", reason, node=type(run.optimizer).__name__, remedy=remedy)
    if isinstance(run.scheduler, ReduceLROnPlateau) and run.scheduler.mode == "max" and not validated:
        reason, remedy = 'mode "max" needs the result of validate, and there is none', 'validate=..., or mode="min"'
        raise QuantflowError("train", reason, node="ReduceLROnPlateau", remedy=remedy)
    if saved:
        for name, owner in (("optimizer", run.optimizer), ("scheduler", run.scheduler)):
            if owner is not None and not (hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")):
                reason, remedy = f"a {type(owner).__name__} has no state_dict to save", "train without checkpoints"
                raise QuantflowError("train", reason, node=name, remedy=remedy)
        run.check_can_be_saved()


def update(run: TrainingState, value: torch.Tensor, clip_norm: float | None) -> None:
    """Run backward from the loss ``value``, then one step of the optimizer and of the scheduler.

    Raises:
        QuantflowError: at stage ``"train"``, if ``value`` is not a finite scalar or depends on no parameter, or if the
            optimizer fails on the gradients.
    """
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        given = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        remedy = "return a tensor of one number, as loss.mean()"
        raise QuantflowError("train", f"the loss is {given}", node=f"batch {run.batch}", remedy=remedy)
    if not value.requires_grad:
        remedy = "compute it from the graph's output, without detach() and no_grad()"
        raise QuantflowError("train", "the loss depends on no parameter", node=f"batch {run.batch}", remedy=remedy)
    figure = value.item()
    if not torch.isfinite(value):
        remedy = "lower the learning rate, or pass clip_norm"
        raise QuantflowError("train", f"the loss is {figure}", node=f"batch {run.batch}", remedy=remedy)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(value).backward()
    if clip_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.graph.parameters(), clip_norm)
    _step(run)
    if run.scheduler is not None and not isinstance(run.scheduler, ReduceLROnPlateau):
        run.scheduler.step()
    if run.average is not None:
        run.average.update_parameters(run.graph)
    run.batch, run.step, run.loss_sum = run.batch + 1, run.step + 1, run.loss_sum + figure


def end_epoch_on_plateau(run: TrainingState) -> None:
    """Step a ``ReduceLROnPlateau`` with the result of ``validate`` (mode "max") or the mean training loss (mode "min")."""
    if isinstance(run.scheduler, ReduceLROnPlateau):
        figures: dict[str, list[float]] = {"max": run.history.metric, "min": run.history.loss}
        run.scheduler.step(figures[run.scheduler.mode][-1])


def _step(run: TrainingState) -> None:
    try:
        run.scaler.step(run.optimizer)
    except (RuntimeError, ValueError, TypeError) as error:
        reason, remedy = f"it takes no step on this graph: {str(error)[:300]}", "use another, as torch.optim.AdamW"
        raise QuantflowError("train", reason, node=type(run.optimizer).__name__, remedy=remedy) from error
    run.scaler.update()
