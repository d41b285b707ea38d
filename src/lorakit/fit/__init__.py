"""Fitting: one readable loop, its checkpoints, its run directory, and the use of what came out."""

from lorakit.fit.run import Result, fit
from lorakit.fit.use import evaluate, predict

__all__ = ["Result", "evaluate", "fit", "predict"]
