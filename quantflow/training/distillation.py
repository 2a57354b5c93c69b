"""Knowledge distillation: losses on the outputs and on the intermediate outputs of the float model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.simulation.interpreter import float_tensors
from quantflow.training.features import FeatureRecorder, recorded_features
from quantflow.upstream import pytree

# Arguments: the task's loss (None if the teacher alone counts), the output, the positional and the keyword inputs of a batch.
MixedLoss = Callable[[torch.Tensor | None, Any, tuple, dict[str, Any]], torch.Tensor]
RecorderPairs = list[tuple[FeatureRecorder, FeatureRecorder]]  # (student, teacher)


@dataclass(frozen=True)
class Distillation:
    """Trains the graph towards the outputs of a teacher (Hinton et al. 2015, arXiv:1503.02531).

    The loss becomes ``(1 - weight)·loss(output, target) + weight·divergence``, and for each layer of ``features``, besides,
    ``feature_weight·‖layer - teacher's‖² / ‖teacher's‖²`` (after FitNets, Romero et al. 2015, arXiv:1412.6550; relative, so
    that layers of any size count alike).

    Attributes:
        teacher: The float model in inference mode, called with the same inputs, without gradients. For ``features`` it is a
            captured graph.
        weight: Share of the teacher, 0 to 1. At 1 the teacher alone counts, and batches need no target.
        temperature: T, by which logits are divided.
        logits: Picks the logits, [batch, classes], out of an output; by default the output itself. With ``"mse"``, what is
            compared.
        features: Layers whose outputs are trained towards the teacher's, by their dotted names in the eager model.
        feature_weight: The factor of each feature loss.
        divergence: ``"kl"``, for classifiers: ``T²·KL(teacher/T ‖ output/T)`` of the logits. ``"mse"``, for any outputs:
            ``‖output - teacher's‖² / ‖teacher's‖²``, the mean over all float tensors that the network returns.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> teacher = qf.export(torch.nn.Linear(8, 4), (torch.randn(2, 8),)).module().eval()
        >>> student = qf.prepare(teacher, XNNPACKQuantizer(), qat=True)
        >>> data = [(torch.randn(2, 8), torch.tensor([0, 1]))]
        >>> history = qf.train(student, data, distill=qf.Distillation(teacher), progress=False)
        >>> len(history.loss)
        1
    """

    teacher: Callable[..., Any]
    weight: float = 0.9
    temperature: float = 4.0
    logits: Callable[[Any], Any] = lambda output: output
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    divergence: Literal["kl", "mse"] = "kl"

    def __post_init__(self) -> None:
        if self.divergence not in ("kl", "mse"):
            remedy = '"kl" for logits, "mse" for any outputs'
            raise QuantflowError("train", f"unknown: {self.divergence!r}", node="distill.divergence", remedy=remedy)

    @contextlib.contextmanager
    def attached(self, graph: TrainableGraphModule) -> Iterator[MixedLoss]:
        """Record the features of ``graph`` and of the teacher while the context is active.

        Args:
            graph: The graph that is trained.

        Returns:
            A context manager, which gives the loss: of the task's loss, the output, and the positional and keyword inputs.
        """
        with recorded_features(graph, self.features) as ours, recorded_features(self.teacher, self.features) as theirs:

            def mixed(task_loss: torch.Tensor | None, output: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
                return self._loss(task_loss, output, args, kwargs, list(zip(ours, theirs, strict=True)))

            yield mixed

    def _loss(
        self,
        task_loss: torch.Tensor | None,
        output: Any,
        args: tuple,
        kwargs: dict[str, Any],
        recorders: RecorderPairs,
    ) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.logits(self.teacher(*args, **kwargs))
        found = self.logits(output)
        total = self.weight * (self._kl(found, wanted) if self.divergence == "kl" else _relative_error(found, wanted))
        if task_loss is not None:
            total = total + (1 - self.weight) * task_loss
        for ours, theirs in recorders:
            total = total + self.feature_weight * _relative_error(ours.take(), theirs.take())
        return total

    def _kl(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        ours, theirs = (F.log_softmax(logits / self.temperature, dim=-1) for logits in (found, wanted))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _relative_error(found: Any, wanted: Any) -> torch.Tensor:
    """The squared error relative to the square of ``wanted``, the mean over all float tensors."""
    ours, theirs = (float_tensors(pytree.tree_leaves(output)) for output in (found, wanted))
    errors = [
        (a - b).square().sum() / b.square().sum().clamp(min=torch.finfo(b.dtype).tiny)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(errors).mean()
