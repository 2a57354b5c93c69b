"""Knowledge distillation: losses on the outputs and on the intermediate outputs of the float model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.training.features import FeatureRecorder, recorded_features

# Arguments: the task's loss (None if the teacher alone counts), the output, the positional and the keyword inputs of a batch.
MixedLoss = Callable[[torch.Tensor | None, Any, tuple, dict[str, Any]], torch.Tensor]
RecorderPairs = list[tuple[FeatureRecorder, FeatureRecorder]]  # (student, teacher)


@dataclass(frozen=True)
class Distillation:
    """Trains the graph towards the outputs of a teacher (Hinton et al. 2015, arXiv:1503.02531).

    The loss becomes ``(1 - weight)·loss(output, target) + weight·T²·KL(teacher/T ‖ output/T)``, and for each layer of
    ``features``, besides, ``feature_weight·‖layer - teacher's‖² / ‖teacher's‖²`` (after FitNets, Romero et al. 2015,
    arXiv:1412.6550; relative, so that layers of any size count alike).

    Attributes:
        teacher: The float model in inference mode, called with the same inputs, without gradients. For ``features`` it is a
            captured graph.
        weight: Share of the teacher, 0 to 1. At 1 the teacher alone counts, and batches need no target.
        temperature: T, by which logits are divided.
        logits: Picks the logits, [batch, classes], out of an output; by default the output itself.
        features: Layers whose outputs are trained towards the teacher's, by their dotted names in the eager model.
        feature_weight: The factor of each feature loss.

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
    logits: Callable[[Any], torch.Tensor] = lambda output: output
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

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
            teacher = self.logits(self.teacher(*args, **kwargs)) / self.temperature
        student = F.log_softmax(self.logits(output) / self.temperature, dim=-1)
        divergence = F.kl_div(student, F.log_softmax(teacher, dim=-1), reduction="batchmean", log_target=True)
        total = self.weight * self.temperature**2 * divergence
        if task_loss is not None:
            total = total + (1 - self.weight) * task_loss
        for ours, theirs in recorders:
            wanted = theirs.take()
            size = wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)
            total = total + self.feature_weight * (ours.take() - wanted).square().sum() / size
        return total
