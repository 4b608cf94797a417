"""Which of several classes a scene shows."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_eff.glimpse.tasks.base import Task, check_target

ClassificationScore = Literal["log_probability", "probability", "kl"]


class ClassificationTask(Task):
    """Name the class of a scene.

    The loss is the cross-entropy, or with a teacher KL(teacher || student).

    Args:
        num_classes: K >= 2.
        score: Of a prediction: logarithm of the true class's probability; that probability itself; or minus
            KL(teacher || student), which needs a teacher and no label.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, num_classes: int, score: ClassificationScore = "log_probability") -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        if score not in get_args(ClassificationScore):
            raise ValueError(f"score must be one of {', '.join(get_args(ClassificationScore))}, got {score!r}")
        self.num_classes, self.score_kind = num_classes, score

    def loss(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        """Return the cross-entropy, or the divergence from ``teacher`` [B, K] where there is one: a scalar."""
        if teacher is not None:
            return _divergence(teacher, prediction).mean()
        return F.cross_entropy(prediction, check_target(target, "ClassificationTask"))

    def score(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        """Return the score of each image [B].

        Raises:
            ValueError: There is no target, or no teacher for ``"kl"``.
        """
        if self.score_kind == "kl":
            if teacher is None:
                raise ValueError("ClassificationTask(score='kl') compares with a teacher: give AdaGlimpseModule one")
            return -_divergence(teacher, prediction)
        label = check_target(target, "ClassificationTask")
        true = prediction.float().log_softmax(1).gather(1, label.unsqueeze(1)).squeeze(1)
        return true if self.score_kind == "log_probability" else true.exp()

    def confidence(self, prediction: Tensor) -> Tensor:
        """Return the largest probability [B]."""
        return prediction.float().softmax(1).amax(1)

    def metrics(self) -> MetricCollection:
        """Return ``accuracy``, the share of images whose class is right."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})

    def metric_inputs(self, prediction: Tensor, images: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Return logits [B, K] and labels [B]."""
        return prediction, check_target(target, "ClassificationTask")


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    known = teacher.float().log_softmax(1)
    return (known.exp() * (known - student.float().log_softmax(1))).sum(1)
