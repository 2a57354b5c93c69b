"""Training of captured graphs: the loop, and the pieces of it for a loop of one's own."""

from quantflow.training.checkpoint import Checkpoints
from quantflow.training.distillation import Distillation
from quantflow.training.history import History
from quantflow.training.loop import train
from quantflow.training.schedule import Schedule

__all__ = ["Checkpoints", "Distillation", "History", "Schedule", "train"]
