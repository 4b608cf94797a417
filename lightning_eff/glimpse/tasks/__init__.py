"""Tasks: classification, reconstruction, segmentation."""

from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.glimpse.tasks.reconstruction import ReconstructionTask

__all__ = ["ClassificationTask", "ReconstructionTask", "Task"]
