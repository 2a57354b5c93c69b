"""Error messages for models that can't be captured, with the source line of the model."""

from __future__ import annotations

import copy
import os
import re
import traceback

import torch
from torch import nn

from quantflow.errors import QuantflowError
from quantflow.graph.own_state import state_kept
from quantflow.upstream import pytree

_PACKAGES = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))


def why_not(model: nn.Module, given: tuple, widened: tuple | None, error: Exception) -> QuantflowError:
    """Return the error for a model that can't be traced or that does not run on the example inputs.

    Args:
        model: The model.
        given: The example inputs, positional and keyword.
        widened: The inputs used to capture a dynamic batch, with a batch of one doubled; None without a dynamic batch.
        error: The exception that the capture raised.
    """
    name = type(model).__name__
    if (eager := _eager_error(model, given)) is not None:
        reason = f"{name} itself does not run on the example inputs: {_first_lines(eager)}"
        return QuantflowError("export", reason, node="args", remedy="pass inputs on which model(*args, **kwargs) runs")
    remedy = "make the data-dependent part static (torch.cond, torch._check), or export a submodule"
    doubled = None if widened is None else _eager_error(model, widened)
    specialized = "marked batch as dynamic" in str(error)
    if doubled is not None or specialized:
        remedy = "pass dynamic_batch=False if dimension 0 is not a batch or has a fixed size (by a state)"
    if doubled is not None:
        reason = f"{name} runs on the example inputs but not on a batch of two: {_first_lines(doubled)}"
        return QuantflowError("export", reason, node="dynamic_batch", remedy=remedy)
    if _constrained(error) is not None:
        remedy = "pass dynamic_batch=False, or dynamic_shapes with bounds in which the condition holds"
    if "specialized it to be a constant (1)" in str(error):
        remedy = "pass an example of size two or more, or dynamic_batch=N: torch.export fixes a size of one"
    return QuantflowError(
        "export",
        f"torch.export could not trace {name}{_place(error)}: {_first_lines(error)}",
        node="dynamic_batch" if specialized else _constrained(error),
        remedy=f"{remedy}; no quantization is involved at this stage",
    )


def _constrained(error: Exception) -> str | None:
    """The input whose sizes can't be as dynamic as they were declared, or None if that is not the error."""
    found = re.search(r"L\['(\w+)'\]", str(error)) if "Constraints violated" in str(error) else None
    return found[1] if found else None


def _eager_error(model: nn.Module, inputs: tuple) -> Exception | None:
    """The exception that ``model`` raises on ``inputs``, or None if it runs. The model's state does not change."""
    try:
        with torch.no_grad(), state_kept(model):
            args, kwargs = pytree.tree_map(_own, inputs)
            model(*args, **kwargs)
    except Exception as error:
        return error
    return None


def _own(leaf: object) -> object:
    """A copy of one input. ``copy.deepcopy`` fails on a tensor that was computed from others."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return copy.deepcopy(leaf)


def _place(error: Exception) -> str:
    """The line of the model where the trace failed, as `` at FILE:LINE``: the last one outside torch and this package."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'File "([^"]+)", line (\d+)', str(error))  # dynamo's frames are in its message
    own = [(file, line) for file, line in frames if not file.startswith((*_PACKAGES, "<"))]
    return f" at {own[-1][0]}:{own[-1][1]}" if own else ""


def _first_lines(error: Exception, limit: int = 400) -> str:
    text = re.sub(r"^Caused by: .*\n", "", f"{type(error).__name__}: {error}".strip(), flags=re.MULTILINE)
    return text if len(text) <= limit else text[:limit].rstrip() + " ..."
