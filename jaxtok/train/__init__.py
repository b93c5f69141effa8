"""Training: `fit` (one jitted step, exact resume), checkpoints, the metrics file and its curves."""

from jaxtok.train.checkpoint import load
from jaxtok.train.figures import curves
from jaxtok.train.loop import TrainState, fit
from jaxtok.train.metrics import read

__all__ = ["TrainState", "curves", "fit", "load", "read"]
