"""Training of captured graphs: the training loop, and its parts for custom training loops."""

from quantflow.training.checkpoint import Checkpoints
from quantflow.training.distillation import Distillation
from quantflow.training.history import History
from quantflow.training.loop import train
from quantflow.training.schedule import Schedule
from quantflow.training.validation import Accuracy, Fidelity

__all__ = ["Accuracy", "Checkpoints", "Distillation", "Fidelity", "History", "Schedule", "train"]
