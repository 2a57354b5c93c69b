"""What training measured, and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """One entry an epoch.

    Attributes:
        loss: Mean training loss.
        metric: What ``validate`` returned for the graph with fake quantization; empty without it.
        converted_metric: What it returned for the converted graph; empty unless asked for.
        best_epoch: The epoch whose weights were kept, None where the last were.
        resumed_at: The steps at which the run was resumed.
    """

    loss: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)
    converted_metric: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    resumed_at: list[int] = field(default_factory=list)

    def plot(self) -> Any:
        """A matplotlib figure of loss and metrics over epochs."""
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        figure, axes = plt.subplots(1, 2 if self.metric else 1, figsize=(10 if self.metric else 5, 3.5), squeeze=False)
        epochs = range(1, len(self.loss) + 1)
        axes[0, 0].plot(epochs, self.loss, marker="o")
        axes[0, 0].set(xlabel="epoch", ylabel="training loss")
        if self.metric:
            axis = axes[0, 1]
            axis.plot(epochs, self.metric, marker="o", label="fake quantized")
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
