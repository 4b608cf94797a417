"""Loss, score, confidence and metrics of the three tasks."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn import functional as F

from lightning_eff.glimpse.tasks import ClassificationTask, ReconstructionTask, SegmentationTask, Task

TARGET = torch.tensor([2, 0, 1])
NO_IMAGES = torch.zeros(3, 1, 4, 4)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# classification


def test_loss_of_classes_is_the_cross_entropy_or_the_divergence_from_a_teacher():
    task, logits, teacher = ClassificationTask(4), some(3, 4), some(3, 4, seed=1)
    torch.testing.assert_close(task.loss(logits, NO_IMAGES, TARGET), F.cross_entropy(logits, TARGET))
    expected = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(task.loss(logits, NO_IMAGES, None, teacher), expected)


@pytest.mark.parametrize(("kind", "expected"), [("probability", [0.5, 0.25, 0.125]), ("log_probability", [-1, -2, -3])])
def test_score_of_classes_is_the_true_ones_probability_or_its_logarithm(kind, expected):
    probability = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.375, 0.125, 0.5]])
    score = ClassificationTask(3, kind).score(probability.log(), NO_IMAGES, TARGET)
    scale = math.log(2) if kind == "log_probability" else 1
    torch.testing.assert_close(score, torch.tensor(expected) * scale)


def test_score_against_a_teacher_is_minus_the_divergence_and_needs_no_label():
    task, logits, teacher = ClassificationTask(4, "kl"), some(3, 4), some(3, 4, seed=1)
    score = task.score(logits, NO_IMAGES, None, teacher)
    expected = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(score, -expected)
    torch.testing.assert_close(task.score(teacher, NO_IMAGES, None, teacher), torch.zeros(3))
    with pytest.raises(ValueError, match=r"score='kl'\) compares with a teacher"):
        task.score(logits, NO_IMAGES, TARGET)


def test_confidence_is_the_largest_probability():
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05], [1 / 3, 1 / 3, 1 / 3]]).log()
    torch.testing.assert_close(ClassificationTask(3).confidence(logits), torch.tensor([0.5, 0.9, 1 / 3]))


def test_accuracy_is_the_share_of_right_classes():
    task = ClassificationTask(3)
    metrics = task.metrics()
    logits = F.one_hot(torch.tensor([2, 1, 1]), 3).float()
    metrics.update(*task.metric_inputs(logits, NO_IMAGES, TARGET))
    assert metrics.compute() == {"accuracy": pytest.approx(2 / 3)}
    assert task.higher_is_better


def test_half_precision_logits_are_scored_in_single_precision():
    assert ClassificationTask(4).score(some(3, 4).bfloat16(), NO_IMAGES, TARGET).dtype == torch.float32


# reconstruction


def test_loss_of_images_is_the_mean_squared_error_of_normalised_pixels():
    prediction, images = some(2, 3, 4, 4), some(2, 3, 4, 4, seed=1)
    loss = ReconstructionTask([0.4, 0.5, 0.6], 0.2).loss(prediction, images)
    torch.testing.assert_close(loss, (prediction - images).square().mean())


def test_score_of_images_is_minus_the_error_of_each_in_grey_levels():
    task = ReconstructionTask(mean=0.5, std=0.25)
    images = torch.zeros(2, 1, 4, 4)  # grey levels 127.5
    prediction = torch.stack([torch.full((1, 4, 4), 0.4), torch.full((1, 4, 4), 1.0)])
    torch.testing.assert_close(task.score(prediction, images), torch.tensor([-25.5, -63.75]))


def test_grey_levels_are_clipped():
    levels = ReconstructionTask().grey_levels(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).view(5, 1, 1, 1))
    assert levels.flatten().tolist() == [0, 0, 127.5, 255, 255]


def test_mean_and_deviation_are_those_of_channels():
    task = ReconstructionTask(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])
    levels = task.grey_levels(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(levels, torch.tensor([0.6, 0.45, 0.425]) * 255)
    assert not task.state_dict()


def test_error_over_all_pixels_is_not_the_mean_error_of_images():
    task = ReconstructionTask()
    metrics = task.metrics()
    prediction = torch.cat([torch.full((1, 1, 4, 4), 0.2), torch.full((1, 1, 4, 4), 0.4)])
    for image in prediction.split(1):  # batch after batch
        metrics.update(*task.metric_inputs(image, torch.zeros(1, 1, 4, 4)))
    values = metrics.compute()
    assert values["rmse_per_image"] == pytest.approx(0.3 * 255)
    assert values["rmse"] == pytest.approx(math.sqrt((0.2**2 + 0.4**2) / 2) * 255)
    assert not task.higher_is_better


# segmentation


def test_loss_of_pixels_is_the_mean_over_images_of_that_over_counted_pixels():
    task, logits = SegmentationTask(3), some(2, 3, 4, 5)
    target = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    target[0, :3] = 255
    expected = torch.stack([F.cross_entropy(logits[n : n + 1], target[n : n + 1], ignore_index=255) for n in (0, 1)])
    torch.testing.assert_close(task.score(logits, NO_IMAGES, target), -expected)
    torch.testing.assert_close(task.loss(logits, NO_IMAGES, target), expected.mean())


def test_an_image_without_any_counted_pixel_costs_nothing():
    score = SegmentationTask(3).score(some(1, 3, 2, 2), NO_IMAGES, torch.full((1, 2, 2), 255))
    assert score.tolist() == [0]


def test_loss_beside_a_teacher_is_ten_times_the_divergence_of_pixels():
    logits, teacher = some(2, 3, 4, 5), some(2, 3, 4, 5, seed=1)
    divergence = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(SegmentationTask(3).loss(logits, NO_IMAGES, None, teacher), 10 * divergence.mean())


def test_metrics_of_pixels_leave_out_ignored_ones():
    task = SegmentationTask(2)
    target = torch.tensor([[[0, 0, 0, 1], [1, 255, 255, 255]]])
    named = torch.tensor([[[0, 0, 1, 1], [1, 0, 1, 1]]])
    metrics = task.metrics()
    metrics.update(*task.metric_inputs(F.one_hot(named, 2).permute(0, 3, 1, 2).float(), NO_IMAGES, target))
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["pixel_accuracy"] == pytest.approx(4 / 5)
    assert values["mean_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["iou"] == pytest.approx((2 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize("label", [3, -1, 254])
def test_a_label_that_is_no_class_is_refused_by_name(label):
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    target[0, 1, 1] = label
    for ask in (SegmentationTask(3).score, SegmentationTask(3).metric_inputs):
        with pytest.raises(ValueError, match=rf"labels 0 ... 2 and ignore_index=255, got \[{label}\]"):
            ask(some(1, 3, 2, 2), NO_IMAGES, target)


# all of them


@pytest.mark.parametrize(
    ("task", "name"),
    [(ClassificationTask(3), "accuracy"), (ReconstructionTask(), "rmse"), (SegmentationTask(3), "iou")],
)
def test_the_first_metric_is_the_one_papers_report(task, name):
    assert next(iter(task.metrics())) == name


def test_tasks_without_confidence_say_so():
    assert ReconstructionTask().confidence(some(1, 1, 2, 2)) is None
    assert SegmentationTask(3).confidence(some(1, 3, 2, 2)) is None


@pytest.mark.parametrize("task", [ClassificationTask(4), SegmentationTask(4)])
def test_a_missing_target_is_named(task):
    with pytest.raises(ValueError, match=f"{type(task).__name__} needs a target, a tensor of labels; got NoneType"):
        task.score(some(3, 4), NO_IMAGES, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassificationTask(1), "num_classes must be >= 2, got 1"),
        (
            lambda: ClassificationTask(3, "margin"),
            "score must be one of log_probability, probability, kl, got 'margin'",
        ),
        (lambda: ReconstructionTask(std=[1.0, 0.0]), r"std must be > 0, got \[1.0, 0.0\]"),
        (lambda: SegmentationTask(1), "num_classes must be >= 2, got 1"),
        (lambda: SegmentationTask(21, 20), "ignore_index must lie outside of the classes 0 ... 20, got 20"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ClassificationTask", "{num_classes: 10, score: kl}"),
        ("ReconstructionTask", "{mean: [0.5, 0.4, 0.3], std: 0.2}"),
        ("SegmentationTask", "{num_classes: 10}"),
    ],
)
# newer versions of jsonargparse have another name for it, older ones this one alone
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_yaml_builds_tasks(name, options):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    text = f"task: {{class_path: lightning_eff.glimpse.tasks.{name}, init_args: {options}}}"
    assert type(parser.instantiate_classes(parser.parse_string(text)).task).__name__ == name
