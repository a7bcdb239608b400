"""What is trained: a noise process with its loss, one class each, under the names of the YAML key noise_process."""

from . import masked, mixed  # they register themselves
from .base import OBJECTIVES, CleanBatch, EvaluationBatch, Objective, TrainingBatch

__all__ = ["OBJECTIVES", "CleanBatch", "EvaluationBatch", "Objective", "TrainingBatch", "masked", "mixed"]
