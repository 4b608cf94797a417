"""Tasks: classification, reconstruction, segmentation."""

from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.glimpse.tasks.reconstruction import ReconstructionTask
from lightning_eff.glimpse.tasks.segmentation import SegmentationTask

__all__ = ["ClassificationTask", "ReconstructionTask", "SegmentationTask", "Task"]
