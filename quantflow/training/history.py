"""The losses and metrics of a training run, and a plot of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class History:
    """The losses and metrics of a training.

    Attributes:
        loss: The mean training loss of each epoch.
        start_metric: The value of ``validate`` before the first step; None without ``validate``.
        metric: The value of ``validate`` after each epoch, for the graph with fake quantization; empty without ``validate``.
        converted_metric: The value of ``validate`` after each epoch, for the converted graph; empty unless asked for.
        best_epoch: The epoch whose weights were kept, from 0; -1 where those before the first step were, None without
            ``validate``, where those of the last epoch are.
        frozen_weights: The share of the quantized weights that oscillated and are frozen, after each epoch; empty with an
            optimizer that does not look for them.
        resumed_at: The steps at which the run was resumed.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> graph = qf.export(torch.nn.Linear(8, 4), (torch.randn(2, 8),)).module()
        >>> data = [(torch.randn(2, 8), torch.tensor([0, 1]))]
        >>> history = qf.train(graph, data, epochs=3, validate=lambda graph: 0.5, progress=False)
        >>> history.metric, history.best_epoch
        ([0.5, 0.5, 0.5], 0)
    """

    loss: list[float] = field(default_factory=list)
    start_metric: float | None = None
    metric: list[float] = field(default_factory=list)
    converted_metric: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    frozen_weights: list[float] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    def plot(self) -> Figure:
        """Draw loss and metrics over epochs, as a matplotlib figure."""
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        figure, axes = plt.subplots(1, 2 if self.metric else 1, figsize=(10 if self.metric else 5, 3.5), squeeze=False)
        epochs = range(1, len(self.loss) + 1)
        axes[0, 0].plot(epochs, self.loss, marker="o")
        axes[0, 0].set(xlabel="epoch", ylabel="training loss")
        if self.metric:
            axis = axes[0, 1]
            start = [] if self.start_metric is None else [self.start_metric]
            axis.plot([*range(len(start)), *epochs], start + self.metric, marker="o", label="fake quantized")
            if self.converted_metric:
                axis.plot(epochs, self.converted_metric, marker="x", linestyle="--", label="converted")
            if self.best_epoch is not None:
                axis.axvline(self.best_epoch + 1, color="grey", linewidth=0.8, label="kept")
            axis.set(xlabel="epoch", ylabel="metric")
            axis.legend()
        for axis in axes[0]:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.tight_layout()
        return figure
