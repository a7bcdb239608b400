"""Training objectives: a noise process and its loss, one class for each value of the YAML key noise_process."""

from . import masked, mixed  # importing registers them
from .base import OBJECTIVES, CleanBatch, EvaluationBatch, Objective, TrainingBatch

__all__ = ["OBJECTIVES", "CleanBatch", "EvaluationBatch", "Objective", "TrainingBatch", "masked", "mixed"]
